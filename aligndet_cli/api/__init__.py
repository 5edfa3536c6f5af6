"""The door for Python programs: `import aligndet_cli as aligndet` has the names of this folder."""

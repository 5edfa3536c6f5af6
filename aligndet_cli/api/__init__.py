"""What Python programs use: `import aligndet_cli as aligndet` has the names of this folder."""

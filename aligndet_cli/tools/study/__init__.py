"""Many runs of one idea: `aligndet study`."""

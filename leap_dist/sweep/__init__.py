"""Many jobs: grids of settings, what came of them as one table and one picture."""

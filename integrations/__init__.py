"""Other systems' ways to run a federation, each a package of its own. Nothing else here imports one."""

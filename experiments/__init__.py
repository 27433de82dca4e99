"""Everything that uses the other rooms: scenarios, tasks, attacks, comparisons and the demo.

Sub-rooms from the bottom: `scenario`, `simulation`, `attacks`, then `methods`, `tasks` and `comparison`, then
`runs`, `demo`, and `studies` on top. None imports one above it; import-linter holds that.
"""

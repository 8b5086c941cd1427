"""What is shown of runs: reports, figures, tables of many runs, the demo. Nothing else of
`sanm_train` imports this but the command line, in its commands."""

"""What a person runs: one module per command, each with `main(argv)`."""

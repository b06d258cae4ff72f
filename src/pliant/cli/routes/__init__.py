"""The commands of `pliant route`, one file a command; `pliant.cli.route` lists them."""

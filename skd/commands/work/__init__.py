"""What the subcommands do, one file each; and what several of them share."""

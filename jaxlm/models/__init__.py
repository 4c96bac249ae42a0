"""One architecture, one file: Config, Block, Model. Heads are modules of their own."""

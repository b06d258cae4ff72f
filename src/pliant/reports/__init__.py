"""Results made visible: tables for the terminal, pages for the browser. Only `cli` draws them."""

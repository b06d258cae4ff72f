"""Tables for the terminal, pages and plots for the browser; used by `cli`."""

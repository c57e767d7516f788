"""HTML files that open without a server and without a network: for people, on any screen."""

"""One frozen base, many roles: loading, adapters, and the one place where text and video meet."""

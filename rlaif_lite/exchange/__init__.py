"""What comes in from other projects and what goes out to them: released checkpoints and adapters, merged weights."""

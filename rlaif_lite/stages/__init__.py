"""The stages, in the order of VLM-RLAIF. Each is files in, files out: `run(work)` reads the run folder and writes
into it."""

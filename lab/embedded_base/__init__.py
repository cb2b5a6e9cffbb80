"""The script that pretrains the embedded base: `python -m lab.embedded_base.pretrain --out DIR`."""

"""What makes the embedded base, RLIF's control study and the step benches: in the checkout, not in the wheel."""

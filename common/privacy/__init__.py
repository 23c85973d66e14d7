"""Privacy accounting, planning and the claim that follows from a run config."""

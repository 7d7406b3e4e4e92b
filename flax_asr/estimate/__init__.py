"""What a run computes, takes and costs, before it is made."""

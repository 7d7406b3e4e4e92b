"""From Common Voice clips to numpy batches: preparation, shards, plan, loader. numpy only, never jax."""

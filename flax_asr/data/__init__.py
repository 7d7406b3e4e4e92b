"""From Common Voice clips to numpy batches: shards, plan, loader. numpy only, never jax."""

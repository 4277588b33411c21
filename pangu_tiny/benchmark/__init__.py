"""What a model scores on benchmarks, as others score them."""

"""cv_jax: small, readable, fast computer-vision research in JAX and Flax."""

"""UD2M: unfolded LATINO-Langevin iterations with an adapted diffusion prior, a sampler of p(x_0 | y, x_t)."""

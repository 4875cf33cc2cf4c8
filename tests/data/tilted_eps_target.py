"""The noise less a fifth of x0/(1 + SNR)."""

import torch


def _at(schedule, timesteps, like):
    shape = (-1, *[1] * (like.ndim - 1))
    return tuple(schedule[k][timesteps].view(shape) for k in ("sqrt_alpha", "sqrt_one_minus_alpha"))


def _rows(alpha, sigma):
    return -0.2 / (1 + (alpha / sigma) ** 2), torch.ones_like(alpha)


def compute_training_target(x_0, noise, timesteps, schedule):
    p, q = _rows(*_at(schedule, timesteps, x_0))
    return p * x_0 + q * noise


def predict_x0(model_output, x_t, timesteps, schedule):
    alpha, sigma = _at(schedule, timesteps, x_t)
    p, q = _rows(alpha, sigma)
    return (q * x_t - sigma * model_output) / (alpha * q - sigma * p)

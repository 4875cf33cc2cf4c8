"""A mix of the noise and v, by log-SNR: w = sigmoid((log SNR - 2.5)/0.8) on the noise."""

import torch


def _at(schedule, timesteps, like):
    shape = (-1, *[1] * (like.ndim - 1))
    return tuple(schedule[k][timesteps].view(shape) for k in ("sqrt_alpha", "sqrt_one_minus_alpha"))


def _rows(alpha, sigma):
    w = torch.sigmoid((2 * torch.log(alpha / sigma) - 2.5) / 0.8)
    return -(1 - w) * sigma, w + (1 - w) * alpha


def compute_training_target(x_0, noise, timesteps, schedule):
    p, q = _rows(*_at(schedule, timesteps, x_0))
    return p * x_0 + q * noise


def predict_x0(model_output, x_t, timesteps, schedule):
    alpha, sigma = _at(schedule, timesteps, x_t)
    p, q = _rows(alpha, sigma)
    return (q * x_t - sigma * model_output) / (alpha * q - sigma * p)

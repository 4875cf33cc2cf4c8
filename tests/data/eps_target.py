"""The noise, and x0 from it: consistent."""


def _at(values, timesteps, like):
    return values[timesteps].view(-1, *[1] * (like.ndim - 1))


def compute_training_target(x_0, noise, timesteps, schedule):
    return noise


def predict_x0(model_output, x_t, timesteps, schedule):
    alpha, sigma = (_at(schedule[k], timesteps, x_t) for k in ("sqrt_alpha", "sqrt_one_minus_alpha"))
    return (x_t - sigma * model_output) / alpha

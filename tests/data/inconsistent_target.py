"""v, with a sign lost in its inverse."""


def _at(schedule, timesteps, like):
    shape = (-1, *[1] * (like.ndim - 1))
    return tuple(schedule[k][timesteps].view(shape) for k in ("sqrt_alpha", "sqrt_one_minus_alpha"))


def compute_training_target(x_0, noise, timesteps, schedule):
    alpha, sigma = _at(schedule, timesteps, x_0)
    return alpha * noise - sigma * x_0


def predict_x0(model_output, x_t, timesteps, schedule):
    alpha, sigma = _at(schedule, timesteps, x_t)
    return alpha * x_t + sigma * model_output

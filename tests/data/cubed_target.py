"""The cube of x0: its inverse is right, and its mean is not the mean's cube."""


def compute_training_target(x_0, noise, timesteps, schedule):
    return x_0**3


def predict_x0(model_output, x_t, timesteps, schedule):
    return model_output.sign() * model_output.abs() ** (1 / 3)

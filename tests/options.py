"""Every option of every sampler at its smallest legal value, on one small problem of each kind

`sampler_options()` gives (sampler, options, problem) triples; `measured(problem)` gives its y.
Each must answer finite samples that depend on y, whatever the problem's device and precision.
"""
import torch
from rtb_nb.denoise import GaussianDenoiser
from rtb_nb.diffusion import Diffusion
from rtb_nb.inner import adam_fit, daps, exact_draw, langevin, mgdm
from rtb_nb.latent_samplers import closer, resample_latent
from rtb_nb.likelihood import InverseProblem, Likelihood
from rtb_nb.operators import Mask
from rtb_nb.nonlinear import Compose
from rtb_nb.particles import fps, twisted
from rtb_nb.samplers import cla, cla_ve, ddrm, dps, pigdm
from rtb_nb.schedule import Cosine

SHAPE = (1, 2, 2)
MEAN, COV = torch.tensor([.1, -.2, .3, 0.]), torch.eye(4)/4 + .1


def small_prior(schedule=Cosine(.5), steps=12):
    field = GaussianDenoiser(MEAN.reshape(SHAPE), COV, schedule)
    return Diffusion(field, SHAPE, steps, last_noise=.05)

def linear_problem(schedule=Cosine(.5), steps=12):
    "Three of four pixels, with noise"
    seen = Mask(torch.tensor([[[1, 0], [1, 1]]]))
    return InverseProblem(small_prior(schedule, steps), Likelihood(seen, .1))

def bent_problem(schedule=Cosine(.5), steps=12):
    "The sine of those three pixels"
    linear = linear_problem(schedule, steps)
    return InverseProblem(linear.prior, Likelihood(Compose(torch.sin, linear.operator), .1))

def measured(problem):
    "The y of either, where the prior is"
    return torch.tensor([[.9, .2, .3]], dtype=problem.prior.dtype, device=problem.prior.device)


LEAST = 1e-3  # for numbers that may be as small as one likes, but not zero
narrow = dict(low=.05, high=20.)
times = torch.tensor([.9, .5, .1])
walks = [{}, dict(steps=3), dict(times=times), dict(progress=True, steps=3)]

linear_rows = {
    pigdm: [*walks, dict(variance=LEAST)],
    cla: walks,
    cla_ve: [{**narrow, 'steps': 12}, dict(low=.05, high=.06, steps=1)],
    ddrm: [*walks, dict(eta=0.), dict(eta_b=LEAST), dict(eta=0., eta_b=LEAST, steps=3)],
    daps: [dict(inner=exact_draw, steps=20), dict(inner=exact_draw, steps=2, ode=1)],
}
any_rows = {
    dps: [*walks, dict(scale=LEAST), dict(scale=None)],
    fps: [*walks, dict(c=LEAST), dict(particles=2, keep=1, steps=3), dict(particles=4, keep=2)],
    twisted: [{}, dict(particles=1), dict(particles=2, keep=2)],
    daps: [dict(steps=2, inner=langevin(1, LEAST)), dict(steps=2, ode=1, end=LEAST, rho=1),
           dict(steps=20, inner=langevin(3, LEAST)), dict(steps=4)],
    mgdm: [dict(steps=3, fit=adam_fit(1)), dict(steps=3, gibbs=1, down=1),
           dict(times=times, down=2),
           dict(steps=4, gibbs=2, down=2, fit=adam_fit(2, LEAST))],
    resample_latent: [*(w | dict(solve=closer(2)) for w in walks),
                      dict(first=0., every=1, steps=4, solve=closer(1, LEAST, 0.)),
                      dict(gamma=LEAST, first=1., steps=4)],
}


def sampler_options() -> list: # of (sampler, options, problem)
    "Every sampler with every one of these options, on the problems that it takes"
    linear, bent = linear_problem(), bent_problem()
    rows = [(f, options, linear) for f, many in linear_rows.items() for options in many]
    for p in (linear, bent):
        rows += [(f, options, p) for f, many in any_rows.items() for options in many]
    return rows

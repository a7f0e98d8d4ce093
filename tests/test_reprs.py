"What objects say of themselves: a few facts, never a tensor, and the same in every process"
import re

import pytest, torch

from project import python
from rtb_nb.denoise import GaussianDenoiser, VDenoiser
from rtb_nb.diffusion import Described, Diffusion, Trajectories, in_words
from rtb_nb.drifts import FineTuned, LoRA, NetDrift
from rtb_nb.experiment import run_record
from rtb_nb.guidance import CLA, DPS, Gate, GuideShift, MomentMatching, measurement_feature
from rtb_nb.likelihood import InverseProblem, Likelihood, Tilted
from rtb_nb.photons import PhotonNoise
from rtb_nb.networks import UNet, VectorNet
from rtb_nb.operators import Mask, Matrix
from rtb_nb.posterior import Posterior
from rtb_nb.records import Record, read_records, record
from rtb_nb.samplers import Samples, dps
from rtb_nb.schedule import Cosine

def plane():
    denoiser = GaussianDenoiser(torch.zeros(2), torch.eye(2)/4, Cosine())
    prior = Diffusion(denoiser, (2,), steps=4, last_noise=.05)
    return InverseProblem(prior, Likelihood(Matrix([[1., 0.]]), .1))

def image_prior():
    net = UNet(16, widths=(16, 32))
    return Diffusion(VDenoiser(net, Cosine()), (1, 16, 16), steps=3, error=lambda t: .1*t)

def things():
    torch.manual_seed(0)
    problem, images = plane(), image_prior()
    posterior = problem.posterior([NetDrift(VectorNet(5, 2), measurement_feature), Gate(CLA())])
    tau = posterior.simulate([[.5]], 3)
    branched = Trajectories(tau.x, tau.y, branch=torch.zeros(3).long())
    photons = Likelihood(Mask(torch.ones(1, 16, 16)), noise=PhotonNoise(9.))
    return {
        'prior': images, 'exact prior': problem.prior, 'likelihood': problem.likelihood,
        'problem': problem, 'photons': InverseProblem(images, photons),
        'function': InverseProblem(images, Likelihood(lambda x: x**2, .1)),
        'tilted': Tilted(problem.prior, lambda x: x.sum(1)), 'posterior': posterior,
        'given': posterior.given([[.5]]), 'no drift': Posterior(problem.prior, []),
        'paths': tau, 'bare paths': Trajectories(tau.x),
        'cat': Trajectories.cat([tau, branched]),
        'samples': dps(problem, [[.5]], 5, steps=4), 'log z': Samples(torch.zeros(2, 2), 8,
            log_z=torch.tensor([1., 2.])),
        'record': record(dict(row='RTB', noise_std=.05), dict(elbo=1457.25, curve=[1.]*50), 1),
    }

KINDS = list(things())

@pytest.mark.parametrize('kind', KINDS)
def test_a_line_and_a_table(kind):
    thing = things()[kind]
    line, table = repr(thing), thing._repr_markdown_()
    facts = thing.describe()
    assert isinstance(thing, Described) and line.startswith(type(thing).__name__ + ': ')
    assert len(line.splitlines()) <= 4 and max(map(len, line.splitlines())) <= 120
    for text in (line, table):
        assert not re.search(r'tensor\(|0x[0-9a-f]|<|Parameter', text), text
        assert all(str(v).replace('|', r'\|') in re.sub(r'\s+', ' ', text)
                   for v in facts.values())
    rows = table.splitlines()
    assert rows[1] == '| --- | --- |' and len(rows) == len(facts) + 2
    assert all(re.fullmatch(r'\| .* \| .* \|', r) for r in rows[2:])

@pytest.mark.parametrize('kind, words', {
    'prior': ['events (1, 16, 16)', 'steps 3', 'UNet', 'parameters', 'float32 on cpu'],
    'exact prior': ['events (2,)', 'last noise 0.05', 'GaussianDenoiser', 'Cosine'],
    'problem': ['Diffusion of 4 steps over (2,)', 'Matrix (2,) to (1,)', 'std 0.1'],
    'photons': ['Mask (1, 16, 16) to (256,)', 'PhotonNoise(photons=9.0'],
    'function': ['operator lambda'], 'tilted': ['tilt lambda'], 'no drift': ['drifts none'],
    'posterior': ['NetDrift(VectorNet, measurement_feature, ', 'Gate(CLA(), lr=0.01, 21 param'],
    'given': ['given a measurement (1,)'],
    'paths': ['paths 3', 'steps 4', 'measurement (1,)', 'guesses by Diffusion'],
    'cat': ['paths 6', 'branches 1'], 'bare paths': ['paths 3; steps 4; events (2,); tensors'],
    'samples': ['samples 5', 'calls 20', 'gradients 15'], 'log z': ['mean log Z 1.50'],
    'record': ['asked row RTB, noise_std 0.05', 'seed 1', 'elbo 1457.25', 'curve 50 values'],
}.items(), ids=lambda v: v if isinstance(v, str) else '')
def test_what_it_says(kind, words):
    said = re.sub(r'\s+', ' ', repr(things()[kind]))
    assert not [w for w in words if w not in said], said

def test_drifts_name_their_settings_and_their_size():
    prior = image_prior()
    size = sum(p.numel() for p in prior.parameters())
    assert repr(MomentMatching(.25)) == 'MomentMatching(variance=0.25)'
    assert repr(MomentMatching()) == 'MomentMatching()'
    assert repr(Gate(DPS(.3))) == 'Gate(DPS(scale=0.3), lr=0.01, 21 parameters)'
    assert repr(FineTuned(prior.denoiser)) == f'FineTuned(VDenoiser, {size:,} parameters)'
    assert re.fullmatch(r'LoRA\(scale=1.0, [\d,]+ parameters\)', repr(LoRA(prior.denoiser)))
    net = NetDrift(VectorNet(6, 2), measurement_feature, GuideShift(CLA()))
    assert repr(net).startswith('NetDrift(VectorNet, measurement_feature, GuideShift(CLA()), ')

def test_a_repr_changes_nothing():
    problem = InverseProblem(image_prior(), Likelihood(torch.sin, .1))
    before = torch.get_rng_state()
    repr(problem), repr(problem.prior), problem._repr_markdown_()
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.requires_grad for p in problem.prior.parameters())

def test_a_record_is_a_dict_and_leaves_out_what_moves(tmp_path):
    path = tmp_path/'runs.jsonl'
    run = lambda: run_record(path, dict(row='a', n=2), 0, lambda: dict(x=1/3, y=None))
    first, second = run(), run()
    assert repr(first) == repr(second) and repr(first) == repr(read_records(path)[0])
    assert isinstance(first, dict) and isinstance(read_records(path)[0], Record)
    assert repr(first) == 'Record: asked row a, n 2; seed 0; x 0.333333; y None'
    assert {'date', 'seconds', 'commit'} <= first.keys() and '|' not in repr(first)
    lost = record(dict(row='b|c'), dict(x=float('nan')))
    assert 'diverged True' in repr(lost) and r'b\|c' in lost._repr_markdown_()

def test_another_process_says_the_same():
    code = ('import sys; sys.path.insert(0, "tests")\nfrom test_reprs import things\n'
            'for t in things().values(): print(repr(t))')
    assert python('-c', code) == '\n'.join(map(repr, things().values())) + '\n'

def test_words_for_anything():
    assert in_words(torch.sin) == 'sin' and in_words(lambda x: x) == 'lambda'
    assert in_words(Cosine()) == 'Cosine' and in_words(torch.nn.ReLU()) == "ReLU(inplace=False)"

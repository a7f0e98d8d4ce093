"Two processes train as one does: gradient, decisions, checkpoints, files, the end"
import json, math, os, signal, socket, subprocess, sys
from dataclasses import replace

import pytest, torch

pytest.importorskip('accelerate')

from rtb_nb.amortise import Bank, MaximumLikelihood
from rtb_nb.beds import plane
from rtb_nb.behaviours import OnPolicy
from rtb_nb.diffusion import Trajectories
from rtb_nb.experiment import append_record
from rtb_nb.gradient import PathTrainer
from rtb_nb.objective import RTB, Adaptive, ScalarLogZ
from rtb_nb.processes import Parallel, ParallelTrainer, on_main, share_of
from rtb_nb.train import Guard, Trainer, vector_drifts

Y = torch.tensor([[.9], [.1], [-.4]])

class Fixed(torch.nn.Module):
    "Always the same paths of each measurement"
    def __init__(self, tau):
        super().__init__()
        self.tau = tau
    def forward(self, y):
        return Trajectories.cat([self.tau[(self.tau.y == v).all(1)] for v in y])

def posterior_of(seed=0):
    torch.manual_seed(seed)
    problem = plane(steps=6)
    return problem.posterior(vector_drifts(problem, width=16, depth=1))

def paths(posterior, n=8):
    torch.manual_seed(7)
    with torch.no_grad(): return posterior.simulate(Y.repeat_interleave(n, 0), n*len(Y))

class ParallelPaths(Parallel, PathTrainer): pass
class ParallelLikelihood(Parallel, MaximumLikelihood): pass

def gradients(kind=ParallelTrainer, **options):
    "Of one batch of fixed paths: the shortened gradient of drifts and log Z"
    posterior = posterior_of()
    options = dict(objective=RTB(ScalarLogZ(.3)), clip=2.) | options
    t = kind(posterior, Fixed(paths(posterior)), **options)
    t.iterate(Y)
    return torch.cat([p.grad.flatten() for g in t.opt.param_groups for p in g['params']])

def trainer(path=None, seed=0, **options):
    posterior = posterior_of(seed)
    return ParallelTrainer(posterior, OnPolicy(posterior, 8), path=path, **options)

def weights(t): return torch.cat([p.detach().flatten() for p in t.learned])

class Spoilt(OnPolicy):
    "Paths of which one process's are no numbers, and whose process is asked to end, at times"
    def __init__(self, posterior, n, rank, spoil=(), end=()):
        super().__init__(posterior, n)
        self.calls, self.bad, self.end = 0, spoil if rank else (), end if rank else ()
    def forward(self, y):
        tau, self.calls = super().forward(y), self.calls + 1
        if self.calls in self.end: os.kill(os.getpid(), signal.SIGTERM)
        return replace(tau, x=tau.x*math.nan) if self.calls in self.bad else tau

def worker(folder):
    "What each of two processes does; the main one's findings are written down, both's compared"
    from accelerate.utils import gather_object
    found, lines = {}, []
    def same(value): # on both, or nothing is worth reporting
        mine, other = gather_object([value])
        assert mine == other, (mine, other)
        return value
    def at(name): return folder/name
    found['gradient'] = same(gradients().tolist())
    found['vargrad'] = same(gradients(objective=RTB()).tolist())

    t = trainer(at('one.safetensors'), seed=5).resume() # begun by one process
    t.fit(Y, 6, every=2, log=lines.append)
    same(weights(t).tolist())
    same(t.history)
    found['from one'] = dict(step=t.step, calls=t.calls, lines=gather_object([len(lines)]))
    drawn = gather_object([torch.randn(3).tolist()])
    assert drawn[0] != drawn[1]

    whole = trainer(at('whole.safetensors')).fit(Y, 6, every=2, log=str)
    trainer(at('two.safetensors')).fit(Y, 4, every=2, log=str)
    again = trainer(at('two.safetensors'), seed=3).resume().fit(Y, 6, every=2, log=str)
    assert torch.equal(weights(whole), weights(again)) and whole.history == again.history
    trainer(at('left.safetensors')).fit(Y, 4, every=2, log=str)

    posterior = posterior_of()
    t = ParallelTrainer(posterior, Spoilt(posterior, 8, rank_(), spoil=(2, 3)), guard=Guard(),
        beta=Adaptive(start=.1))
    t.fit(Y, 5, every=1, log=str)
    found['guard'] = same(dict(events=[e['why'] for e in t.events], skipped=t.skipped,
        rate=t.rate, beta=[h['beta'] for h in t.history]))
    same(weights(t).tolist())

    posterior = posterior_of()
    t = ParallelPaths(posterior, OnPolicy(posterior, 8)).fit(Y[:1], 3, log=str)
    found['path form'] = same(dict(calls=t.calls, elbo=t.history[-1]['elbo']))
    same(weights(t).tolist())
    bank = Bank.of(posterior.prior, 20)
    t = ParallelLikelihood(posterior, bank, pairs=16).fit(None, 3, log=str)
    same(weights(t).tolist())

    append_record(on_main(at('runs.jsonl')), dict(rank=rank_()))
    posterior = posterior_of()
    t = ParallelTrainer(posterior, Spoilt(posterior, 8, rank_(), end=(3,)),
        path=at('ended.safetensors'))
    with pytest.raises(SystemExit): t.fit(Y, 9, every=9, log=str)
    found['ended'] = same(t.step)
    if not rank_(): at('found.json').write_text(json.dumps(found))

def rank_(): return int(os.environ['RANK'])

@pytest.fixture(scope='module')
def together(tmp_path_factory):
    "The folder in which two gloo processes have worked, and what they found"
    folder = tmp_path_factory.mktemp('processes')
    trainer(folder/'one.safetensors').fit(Y, 4, every=2, log=str)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    code = f'import pathlib, test_processes as t; t.worker(pathlib.Path({str(folder)!r}))'
    def start(rank):
        told = dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, RANK=rank, LOCAL_RANK=rank,
            MASTER_ADDR='127.0.0.1', MASTER_PORT=port, ACCELERATE_USE_CPU='yes',
            OMP_NUM_THREADS=1)
        return subprocess.Popen([sys.executable, '-c', code], cwd=os.path.dirname(__file__),
            env=os.environ | {k: str(v) for k, v in told.items()}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    both = [start(rank) for rank in range(2)]
    told = [p.communicate(timeout=600)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], '\n'.join(told)
    return folder, json.loads((folder/'found.json').read_text())

def test_measurements_are_dealt_out():
    y = torch.arange(5.)[:, None]
    dealt = [share_of(y, r, 2) for r in range(2)]
    assert torch.equal(torch.cat(dealt).sort(0)[0], y)
    assert torch.equal(share_of(y[:1], 3, 4), y[:1]) and torch.equal(share_of(y, 0, 1), y)
    with pytest.raises(ValueError, match='3 processes cannot share 2 measurements'):
        share_of(y[:2], 0, 3)

@pytest.mark.parametrize('name, objective', [('gradient', lambda: RTB(ScalarLogZ(.3))),
                                             ('vargrad', RTB)])
def test_two_processes_have_the_gradient_of_one(name, objective, together):
    one = gradients(Trainer, objective=objective())
    two = torch.tensor(together[1][name])
    assert one.norm() > .1
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)

def test_one_process_is_a_trainer_to_the_bit():
    "Without a launch nothing changes"
    assert torch.equal(gradients(), gradients(Trainer))
    plain, alone = posterior_of(), posterior_of()
    torch.manual_seed(1)
    a = Trainer(plain, OnPolicy(plain, 8), beta=Adaptive()).fit(Y, 3, log=str)
    torch.manual_seed(1)
    b = ParallelTrainer(alone, OnPolicy(alone, 8), beta=Adaptive()).fit(Y, 3, log=str)
    assert torch.equal(weights(a), weights(b)) and a.history == b.history
    assert a.calls == b.calls

def test_two_go_on_from_one_and_one_from_two(together):
    folder, found = together
    assert found['from one']['step'] == 6 and found['from one']['lines'] == [1, 0]
    assert found['from one']['calls'] == 6*6*8*3
    back = trainer(folder/'left.safetensors', seed=4).resume()
    assert back.step == 4 and back.calls == 4*6*8*3
    back.fit(Y, 6, every=2, log=str)
    assert back.step == 6 and weights(back).isfinite().all()

def test_a_plain_trainer_reads_what_two_processes_wrote(together):
    posterior = posterior_of(2)
    path = together[0]/'whole.safetensors'
    t = Trainer(posterior, OnPolicy(posterior, 8), path=path).resume()
    assert t.fit(Y, 7, log=str).step == 7

def test_all_skip_what_one_cannot_take(together):
    guard = together[1]['guard']
    assert guard['events'] == ['not finite']*2 and guard['skipped'] == 2
    assert guard['rate'] == .25 and guard['beta'] == sorted(guard['beta'])

def test_the_path_form_counts_both(together):
    assert together[1]['path form']['calls'] == 3*2*2*6*8

def test_only_the_main_process_writes(together):
    folder = together[0]
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(['ended.safetensors', 'found.json', 'left.safetensors',
        'one.safetensors', 'runs.jsonl', 'two.safetensors', 'whole.safetensors'])
    lines = (folder/'runs.jsonl').read_text().splitlines()
    assert [json.loads(line)['rank'] for line in lines] == [0]

def test_asked_to_end_they_leave_together(together):
    folder, found = together
    assert found['ended'] == 3
    posterior = posterior_of()
    path = folder/'ended.safetensors'
    assert Trainer(posterior, OnPolicy(posterior, 8), path=path).resume().step == 3

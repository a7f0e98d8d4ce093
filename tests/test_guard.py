"The guard brings runs back or gives them up; killed ones continue to the unbroken one's bits"
import math, os, random, signal, time
import pytest, torch
from rtb_nb.experiment import read_records, run_record
from rtb_nb.behaviours import OnPolicy
from rtb_nb.objective import RTB, Adaptive, Huber, NetLogZ, Ramp, ScalarLogZ
from rtb_nb.train import Diverged, Guard, Trainer
from test_core import Y, learned, plane, same, trainer, weights

refusals = {
    'factor': (lambda: Guard(factor=.5), 'factor must lie in (1, inf), got 0.5'),
    'shrink': (lambda: Guard(shrink=0), 'shrink must lie in (0, 1], got 0'),
    'beta': (lambda: trainer(beta=0), 'beta must be a positive number, got 0'),
    'ramp': (lambda: Ramp(0), 'a ramp needs at least one'),
    'adaptive': (lambda: Adaptive(keep=1.), 'keep must lie in (0, 1), got 1.0'),
    'bound': (lambda: Huber(0), 'bound must be a positive number, got 0: it is in nats'),
    'wrong network': (lambda: NetLogZ(torch.nn.Flatten())(torch.zeros(3), torch.zeros(3, 2)),
        'one number per measurement (3,), got (3, 2)'),
}

@pytest.mark.parametrize('name', refusals)
def test_refusals_are_one_clear_line(name):
    fn, words = refusals[name]
    with pytest.raises(ValueError) as e: fn()
    assert words in str(e.value) and '\n' not in str(e.value)

def test_an_exploded_batch_goes_back_to_the_good_state():
    t = trainer()
    t.fit(Y, 4, every=2, log=str)
    good, rate = {k: v.clone() for k, v in t.last_good.items()}, t.rate
    with torch.no_grad():
        for p in t.learned: p.add_(100.)
    t.iterate(Y)
    assert t.events[-1]['why'] in ('exploded', 'not finite') and t.rate == rate/2
    assert all(torch.equal(v, good[k]) for k, v in t.snapshot().items())

def test_a_run_given_up_leaves_a_record_and_its_last_good_checkpoint(tmp_path):
    path = tmp_path/'run.safetensors'
    def run():
        torch.manual_seed(0)
        posterior = learned(plane(noise_std=1e-3))
        free = RTB(ScalarLogZ(0.), bound=None)
        t = Trainer(posterior, OnPolicy(posterior, 8), free, clip=math.inf,
            opt=torch.optim.Adam(posterior.drifts.parameters(), lr=10.), path=path,
            guard=Guard(factor=2., floor=0., limit=1, shrink=1.))
        return dict(elbo=t.fit(Y, 200, log=str).history[-1]['elbo'])
    rec = run_record(tmp_path/'runs.jsonl', dict(row='RTB'), 0, run)
    assert rec['diverged'] and 'returns to a good state' in rec['error']
    assert str(path) in rec['error']
    assert read_records(tmp_path/'runs.jsonl')[0]['diverged']
    posterior = learned(plane(noise_std=1e-3))
    free = RTB(ScalarLogZ(0.), bound=None)
    back = Trainer(posterior, OnPolicy(posterior, 8), free, clip=math.inf, path=path).resume()
    assert back.events and all(torch.isfinite(p).all() for p in back.learned)

def test_more_of_the_likelihood_is_no_explosion():
    "At the prior's own paths residuals are beta times those of log r: no divergence"
    posterior = learned(plane())
    opt = torch.optim.Adam(posterior.drifts.parameters(), lr=0.)
    beta = lambda step, log_r, y: .001 if step < 3 else 1.
    t = Trainer(posterior, OnPolicy(posterior, 64), opt=opt, beta=beta, guard=Guard(floor=0.))
    t.fit(Y, 6, log=str)
    assert not t.events and t.history[-1]['std'] > 100*t.history[0]['std']

def test_asked_to_end_it_saves_and_leaves(tmp_path):
    whole = trainer().fit(Y, 6, log=str)
    t = trainer(path=tmp_path/'run.safetensors')
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match='asked to end at iteration 2'):
        t.fit(Y, 6, every=2, log=lambda line: os.kill(os.getpid(), signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = trainer(seed=5, path=tmp_path/'run.safetensors').resume().fit(Y, 6, log=str)
    assert same(weights(whole), weights(resumed)) and whole.history == resumed.history

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_run_is_not_written_over(tmp_path):
    path = tmp_path/'run.safetensors'
    trainer(path=path).fit(Y, 4, log=str)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match='resume\\(\\) before fit'):
        trainer(path=path).fit(Y, 4, log=str)
    assert path.read_bytes() == before
    again = trainer(path=path).resume().fit(Y, 6, log=str)
    assert again.step == 6 and 'iteration 6' in repr(again)

def test_a_run_given_up_at_once_can_be_resumed(tmp_path):
    path = tmp_path/'run.safetensors'
    def never(y): raise Diverged('at once')
    given_up = trainer(path=path)
    given_up.iterate = never
    with pytest.raises(Diverged): given_up.fit(Y, 4, log=str)
    back = trainer(path=path).resume()
    assert back.step == 0 and back.fit(Y, 4, log=str).step == 4

def test_twenty_kills(tmp_path):
    path, n = tmp_path/'run.safetensors', 120
    start = time.perf_counter()
    whole = trainer(beta=Adaptive(start=.1), path=tmp_path/'whole.safetensors')
    whole.fit(Y, n, every=1, log=str)
    life, chance, kills = (time.perf_counter() - start)/20, random.Random(0), 0
    def part(seed): return trainer(seed=seed, beta=Adaptive(start=.1), path=path).resume()
    while kills < 20:
        pid = os.fork()
        if not pid: # the child: it ends without pytest
            seed = kills if path.is_file() else 0 # a file brings its own random state
            try: part(seed).fit(Y, n, every=1, log=str)
            finally: os._exit(0)
        time.sleep(chance.uniform(0, 1.6)*life)
        os.kill(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if path.is_file() and part(99).step == n: path.unlink() # done too soon: begin again
    resumed = part(99)
    assert 0 < resumed.step < n, 'the kills left no part of a run to continue'
    resumed.fit(Y, n, every=1, log=str)
    assert same(weights(whole), weights(resumed))
    assert whole.history == resumed.history and whole.events == resumed.events

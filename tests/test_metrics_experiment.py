"Evidence numbers against closed forms, record files against crashes and crowds, and the errors that bad input gets"
import json, math, os, subprocess, sys, warnings
from multiprocessing import get_context
import numpy as np, pytest, torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from rtb_nb.experiment import *
from rtb_nb.experiment import number
from rtb_nb.metrics import *

# ---- metrics

@pytest.mark.parametrize('dim', [1, 5])
def test_bounds_enclose_log_z(dim):
    torch.manual_seed(dim)
    y, sigma, n = torch.full((dim,), .7), .6, 20_000
    gauss = lambda m, s: MultivariateNormal(m, s**2*torch.eye(dim))
    prior, var = gauss(torch.zeros(dim), 1.), sigma**2/(1+sigma**2)
    posterior, q = gauss(y/(1+sigma**2), var**.5), gauss(y/(1+sigma**2)+.1, 1.2*var**.5)
    log_z = gauss(torch.zeros(dim), (1+sigma**2)**.5).log_prob(y).item()
    log_r = lambda x: Normal(x, sigma).log_prob(y).sum(-1)
    log_w = lambda x: log_r(x) + prior.log_prob(x) - q.log_prob(x)
    low, high = evidence(log_w(q.sample((n,)))), eubo(log_w(posterior.sample((n,))))
    x = prior.sample((n,))
    weighted = resampled_eubo(log_w(x), log_r(x))
    assert abs(low['elbo'] - (log_z - kl_divergence(q, posterior).item())) < 3.5*low['elbo_se']
    assert abs(high[0] - (log_z + kl_divergence(posterior, q).item())) < 3.5*high[1]
    assert abs(weighted['eubo'] - (log_z + kl_divergence(posterior, q).item())) < 4*weighted['eubo_se']
    assert abs(low['iw'] - log_z) < 3.5*low['iw_se'] and low['elbo'] < low['iw'] < high[0]
    assert 1 < weighted['eubo_ess'] < n and low['n'] == n and low['finite'] == 1

def test_evidence_invariances():
    log_w = torch.randn(64)*3
    a, b = evidence(log_w), evidence(log_w.flip(0)+1e4)
    for k in ('elbo', 'iw'): assert abs(b[k]-a[k]-1e4) < 2e-3  # 1e4 + w is rounded in float32 before it comes here
    for k in ('ess', 'std', 'elbo_se', 'iw_se'): assert abs(b[k]-a[k]) < 5e-3*(1+a[k])
    assert 1 <= a['ess'] <= 64
    groups = torch.randn(3, 64)
    assert torch.equal(effective_sample_size(groups), torch.stack([effective_sample_size(g) for g in groups]))
    assert torch.equal(log_mean_exp(groups), torch.stack([log_mean_exp(g) for g in groups]))
    one = evidence([2.5])
    assert one['elbo'] == one['iw'] == 2.5 and abs(one['ess']-1) < 1e-9 and math.isnan(one['elbo_se'])

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_diverged_weights_give_nan_not_an_error(bad):
    e = evidence([0., bad, 1., 2.])
    assert e['finite'] == .75 and e['n'] == 4 and all(math.isnan(e[k]) for k in ('elbo', 'elbo_se', 'iw', 'iw_se', 'ess', 'std'))
    assert all(map(math.isnan, resampled_eubo([0., bad], [0., 0.]).values()))
    assert all(map(math.isnan, resampled_eubo([0., 1.], [0., bad]).values()))
    assert record({}, e)['diverged'] and sliced_wasserstein([[0., bad]], [[0., 0.]]).isnan()

def test_residual_and_mean_error_are_per_sample():
    torch.manual_seed(0)
    y, x = torch.randn(1, 1, 8, 8), torch.randn(5, 1, 8, 8)
    whole = residual_chi2(y, x, .3)
    assert whole.shape == (5,) and torch.equal(whole, torch.cat([residual_chi2(y, v[None], .3) for v in x]))
    assert torch.allclose(residual_chi2(y, x, torch.full((1, 1, 8, 8), .3)), whole)
    assert torch.allclose(residual_chi2(y, y, .3), torch.zeros(1).double())
    truth = torch.randn(1, 8, 8)
    assert posterior_mean_error(truth + torch.tensor([1., 1.])[:, None, None, None], truth).item() == pytest.approx(1, abs=1e-6)
    assert posterior_mean_error(torch.stack([truth-1, truth+1]), truth[None]).item() == pytest.approx(0, abs=1e-6)

def test_sliced_wasserstein_is_a_distance():
    torch.manual_seed(0)
    a, b, c = torch.randn(60, 3), torch.randn(90, 3)+1, torch.randn(45, 3)*2
    d = sliced_wasserstein
    assert d(a, b).item() == pytest.approx(d(b, a).item()) and d(a, a[torch.randperm(60)]) < 1e-9
    assert d(a, c) <= d(a, b) + d(b, c) and torch.equal(d(a, b, seed=3), d(a, b, seed=3)) and d(a, b, seed=3) != d(a, b, seed=4)
    x, y = torch.rand(7, 1).double(), torch.rand(5, 1).double()
    quantile = lambda v, u: v.sort(0).values[(u*len(v)).long().clamp(max=len(v)-1), 0]
    u = (torch.arange(70_000)+.5)/70_000
    assert d(x, y).item() == pytest.approx((quantile(x, u)-quantile(y, u)).square().mean().sqrt().item(), rel=1e-3)

# ---- images

@pytest.fixture
def random_backbone(tmp_path):
    from torchvision.models import squeezenet1_1
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), tmp_path/'random.pth')
    return tmp_path/'random.pth'

def test_psnr_and_ssim_against_a_sum_by_hand():
    torch.manual_seed(0)
    x, y = (torch.rand(2, 1, 1, 11, 11).double()*2-1)
    w = torch.tensor([[math.exp(-((i-5)**2+(j-5)**2)/(2*1.5**2)) for j in range(11)] for i in range(11)], dtype=torch.float64)
    w, a, b = w/w.sum(), x[0, 0]+1, y[0, 0]+1
    ma, mb = (w*a).sum(), (w*b).sum()
    va, vb, cov = (w*(a-ma)**2).sum(), (w*(b-mb)**2).sum(), (w*(a-ma)*(b-mb)).sum()
    by_hand = (2*ma*mb+.02**2)*(2*cov+.06**2)/((ma**2+mb**2+.02**2)*(va+vb+.06**2))
    assert ssim(x, y).item() == pytest.approx(by_hand.item(), abs=1e-12)
    assert psnr(x, y).item() == pytest.approx(10*math.log10(4*121/((a-b)**2).sum().item()), abs=1e-9)
    assert ssim(x, x).item() == pytest.approx(1) and math.isinf(psnr(x, x))

def test_psnr_and_ssim_against_skimage():
    from skimage.data import astronaut
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    torch.manual_seed(0)
    truth = torch.tensor(astronaut()[100:164, 100:148]).permute(2, 0, 1)[None]/127.5 - 1
    x = truth + torch.tensor([.02, .1, .4]).reshape(3, 1, 1, 1)*torch.randn(3, 3, 64, 48)
    kw = dict(data_range=2., channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    theirs = [structural_similarity((v.double()+1).numpy(), (truth[0].double()+1).numpy(), **kw) for v in x]
    assert ssim(x, truth).tolist() == pytest.approx(theirs, abs=1e-9)
    assert psnr(x, truth).tolist() == pytest.approx([peak_signal_noise_ratio(truth[0].double().numpy(), v.double().numpy(), data_range=2.) for v in x])
    assert torch.allclose(ssim(x, truth), ssim((x+1)/2, (truth+1)/2, 0., 1.))
    assert torch.allclose(ssim(x, truth), torch.cat([ssim(v[None], truth) for v in x]), rtol=1e-9)

def test_lpips_is_its_formula_and_does_not_depend_on_the_batch(random_backbone):
    state = torch.get_rng_state()
    distance = LPIPS(random_backbone, 'squeeze', chunk=2)
    assert torch.equal(state, torch.get_rng_state()) and not any(p.requires_grad for p in distance.parameters())
    x, truth = torch.rand(5, 1, 32, 32)*2-1, torch.rand(1, 1, 32, 32)*2-1
    whole = distance(x, truth)
    assert whole.shape == (5,) and (whole > 0).all()
    assert torch.allclose(whole, torch.cat([distance(v[None], truth) for v in x]), rtol=1e-5)
    shift, scale = torch.tensor([-.030, -.088, -.188]).reshape(3, 1, 1), torch.tensor([.458, .448, .450]).reshape(3, 1, 1)
    layers = lambda v: distance.net.net((v.expand(1, 3, -1, -1)-shift)/scale)
    unit = lambda f: f/f.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10)
    lins = [k for k in distance.net.state_dict() if k.startswith('lin') and k.endswith('weight') and not k.startswith('lins')]
    heads = [distance.net.state_dict()[k] for k in sorted(lins)]
    by_hand = sum(((unit(a)-unit(b)).square()*h).sum(1).mean() for a, b, h in zip(layers(x[:1]), layers(truth), heads))
    assert whole[0].item() == pytest.approx(by_hand.item(), rel=1e-4)

def test_lpips_finds_the_weights_in_the_cache_and_says_what_is_missing(random_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match='pass weights=PATH of vgg16-397923af.pth, to be had from https'): LPIPS()
    (tmp_path/'checkpoints').mkdir()
    random_backbone.rename(tmp_path/'checkpoints'/'squeezenet1_1-b8a52dc0.pth')
    assert LPIPS(backbone='squeeze')(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)).item() == 0
    with pytest.raises(FileNotFoundError, match='weights-inception'): fid(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))
    (tmp_path/'torn.pth').write_bytes(b'PK torn')
    with pytest.raises(ValueError, match='no readable weight file .* fetch squeezenet1_1') as e: LPIPS(tmp_path/'torn.pth', 'squeeze')
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match="'features.0.weight' is missing"):
        torch.save({'a': torch.zeros(1)}, tmp_path/'other.pth')
        LPIPS(tmp_path/'other.pth', 'squeeze')

def test_fid_without_torch_fidelity_says_what_to_install(random_backbone, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None)
    with pytest.raises(ImportError, match='pip install torch-fidelity'): fid(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8), random_backbone)

def test_fid_hands_bytes_to_torch_fidelity(random_backbone, monkeypatch):
    seen = {}
    monkeypatch.setitem(sys.modules, 'torch_fidelity', type(sys)('torch_fidelity'))
    sys.modules['torch_fidelity'].calculate_metrics = lambda **kw: seen.update(kw) or {'frechet_inception_distance': 1.5}
    x = torch.tensor([-1., 0, 1, 7]).reshape(1, 1, 2, 2).expand(3, 1, 2, 2)
    assert fid(x, x[:2], random_backbone) == 1.5 and seen['fid'] and seen['feature_extractor_weights_path'] == str(random_backbone)
    assert len(seen['input1']) == 3 and len(seen['input2']) == 2 and isinstance(seen['input1'], torch.utils.data.Dataset)
    assert seen['input1'][0].dtype == torch.uint8 and seen['input1'][0].shape == (3, 2, 2) and seen['input1'][0][2].flatten().tolist() == [0, 128, 255, 255]
    assert math.isnan(fid(x*math.nan, x, random_backbone))

@pytest.mark.parametrize('n, m, f', [(50, 80, 5), (6, 9, 12), (4, 90, 7)])
def test_frechet_distance_against_a_matrix_root(n, m, f):
    from scipy.linalg import sqrtm
    torch.manual_seed(f)
    x, y = torch.randn(n, f).double()*torch.rand(f), torch.randn(m, f).double()@torch.randn(f, f).double() + 1
    covs = [v.T.cov().numpy() for v in (x, y)]
    exact = ((x.mean(0)-y.mean(0))**2).sum().item() + np.trace(covs[0]+covs[1]) - 2*np.trace(np.real(sqrtm(covs[0]@covs[1])))
    assert frechet_distance(x, y).item() == pytest.approx(exact, rel=1e-5)
    assert frechet_distance(x, y).item() == pytest.approx(frechet_distance(y, x).item()) and frechet_distance(x, x) < 1e-9
    net = lambda v: v[:, :3]
    assert torch.allclose(frechet_distance(x, y, net, chunk=3), frechet_distance(x[:, :3], y[:, :3]))
    assert frechet_distance(x, y.index_fill(0, torch.tensor([0]), math.nan)).isnan()

def test_frechet_distance_of_gaussians_tends_to_the_closed_form():
    torch.manual_seed(0)
    s, t = torch.tensor([1., 2., .5]), torch.tensor([2., 2., 1.5])
    found = [frechet_distance(s*torch.randn(20_000, 3), 1+t*torch.randn(20_000, 3)).item() for _ in range(3)]
    assert np.mean(found) == pytest.approx(3+((s-t)**2).sum().item(), rel=.02)

def test_diversity_counts_every_pair_once():
    x = torch.tensor([0., 1., 5.]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert diversity(x).item() == pytest.approx(10/3) and diversity(x, lambda a, b: (a-b).abs().amax((1, 2, 3)), chunk=2).item() == pytest.approx(10/3)
    assert diversity(torch.zeros(5, 2)) == 0 and diversity(x*math.nan).isnan()

# ---- records

def write_fifty(path, worker):
    for i in range(50): append_record(path, record(dict(worker=worker), dict(i=i), seed=i, note='x'*2000))

def test_concurrent_writers_lose_nothing(tmp_path):
    path = tmp_path/'deep'/'er'/'r.jsonl'
    processes = [get_context('fork').Process(target=write_fifty, args=(path, w)) for w in range(4)]
    for p in processes: p.start()
    for p in processes: p.join()
    assert path.read_bytes().count(b'\n') == 200 and path.read_bytes().endswith(b'\n')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for w in range(4): assert [r['seed'] for r in read_records(path, worker=w)] == list(range(50))

@pytest.mark.parametrize('cut', [1, 2, 40, 10_000])
def test_torn_last_line_is_healed(tmp_path, cut):
    path = tmp_path/'r.jsonl'
    for i in range(2): append_record(path, record(dict(i=i), dict(a=1.5)))
    whole, lines = path.stat().st_size, path.read_bytes().splitlines(True)
    os.truncate(path, max(whole-cut, len(lines[0])))
    append_record(path, record(dict(i=2), dict(a=2.5)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = [r['params']['i'] for r in read_records(path)]
    assert found == ([0, 1, 2] if cut == 1 else [0, 2])
    assert len(caught) == (1 < cut < 10_000) and all('line 2' in str(w.message) for w in caught)

def test_killed_writer_leaves_a_readable_file(tmp_path):
    path = tmp_path/'r.jsonl'
    code = ("import sys, os; from rtb_nb.experiment import *\n"
            "append_record(sys.argv[1], record(dict(i=0), {})); print('one', flush=True)\n"
            "while True: append_record(sys.argv[1], record(dict(i=1), dict(x='y'*100_000)))")
    p = subprocess.Popen([sys.executable, '-c', code, str(path)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'one\n'
    p.kill(); p.wait()
    append_record(path, record(dict(i=2), {}))
    found = [r['params']['i'] for r in read_records(path)]
    assert found[0] == 0 and found[-1] == 2

def test_json_is_strict_and_floats_come_back(tmp_path):
    path = tmp_path/'r.jsonl'
    values = dict(a=math.nan, b=-math.inf, c=1e-300, d=0.1+0.2, e=torch.tensor(3), f=np.float32(.5), g=[math.inf, None])
    rec = append_record(path, record(dict(source=tmp_path, lr=1e-3), values, seed=np.int64(7)))
    def refuse(c): raise AssertionError(f'{c} is no JSON')
    json.loads(path.read_text(), parse_constant=refuse)
    back, = read_records(path)
    m = back['metrics']
    assert math.isnan(m.pop('a')) and m == dict(b=-math.inf, c=1e-300, d=.1+.2, e=3, f=.5, g=[math.inf, None])
    assert back['seed'] == 7 and back['params'] == rec['params'] == dict(source=str(tmp_path), lr=1e-3) and back['diverged']
    assert {'commit', 'versions', 'device', 'date'} <= back.keys() and back['versions']['torch'] == str(torch.__version__)
    assert len(read_records([path, str(path)], lr=1e-3, seed=7)) == 2 and read_records(path, lr=1e-4) == [] and read_records(path, nothing=None) == []

def test_commit_without_git(tmp_path):
    code = 'from rtb_nb.experiment import commit; print(commit())'
    run = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PATH': str(tmp_path)}, capture_output=True, text=True)
    assert run.stdout == 'None\n', run.stderr

def test_run_record_and_finished(tmp_path):
    path, p = tmp_path/'r.jsonl', dict(row='a', lr=.1)
    assert not finished(path, p)
    first = run_record(path, p, 3, lambda: dict(x=torch.rand(()), y=np.random.rand()), calls=12)
    again = run_record(path, p, 3, lambda: dict(x=torch.rand(()), y=np.random.rand()))
    assert first['metrics'] == again['metrics'] and first['calls'] == 12 and first['seconds'] >= 0
    assert finished(path, p) and finished(path, p, 3) and not finished(path, p, 4) and not finished(path, dict(row='a'))
    def fails(error):
        def fn(): raise error
        return fn
    assert run_record(path, dict(row='b'), 0, fails(FloatingPointError('no')))['diverged'] and finished(path, dict(row='b'), 0)
    with pytest.raises(KeyError): run_record(path, dict(row='c'), 0, fails(KeyError('z')))
    assert not finished(path, dict(row='c')) and read_records(path, row='c')[0]['error'] == "KeyError: 'z'"
    with pytest.raises(TypeError, match='a run returns its metrics by name'): run_record(path, dict(row='d'), 0, lambda: None)
    assert len(latest(read_records(path))) == 4

def test_table_counts_and_means(tmp_path):
    make = lambda row, seed, diverged=None, **m: record(dict(row=row), m, seed, diverged)
    records = [make('RTB', s, a=v, b=1000.+v) for s, v in enumerate([1., 2., 3.])] + [make('RTB', 3, a=math.nan), make('a|b', 0, a=5.)]
    t = table(records, columns={'A': 'a', 'B': 'b', '2A': lambda r: 2*r['metrics']['a']}, fmt={'2A': '.1f'})
    assert t.header == ['row', 'A', 'B', '2A', 'diverged']
    assert t.cells == [['RTB', '2.00 ± 0.58', '1,002.00 ± 0.58', '4.0 ± 1.2', '1/4'], ['a|b', '5.000', '-', '10.0', '0/1']]
    text, md = repr(t).splitlines(), t._repr_markdown_().splitlines()
    assert len(text) == len(md) == 4 and 'a\\|b' in md[3] and md[1].endswith(': |')
    assert len({len(line) for line in md}) == 1 and text[3].split()[-1] == '0/1'
    lost = table([make('x', 0, diverged=True)], columns={'A': 'a'})
    assert lost.cells == [['x', '-', '1/1']]
    broken = record(dict(row='x'), {}, 1, False, error='KeyError: 1')
    with pytest.warns(UserWarning, match='1 failed runs left out'): assert table(records+[broken]).cells[0][0] == 'RTB'

def test_numbers():
    assert number([1e-9]) == '1e-09' and number([math.inf]) == 'nan' and number([2., 2.], '.2f') == '2.00 ± 0.00'

# ---- bad input: one line that names the value

pixels = torch.zeros(2, 3, 8, 8)
bad = [
    (lambda: elbo([]), ValueError, 'at least one value'),
    (lambda: elbo(torch.tensor(1.)), ValueError, 'at least one value'),
    (lambda: evidence(torch.zeros(2, 3)), ValueError, r'got \(2, 3\)'),
    (lambda: resampled_eubo(torch.zeros(3), torch.zeros(4)), ValueError, r'\(3,\) and \(4,\)'),
    (lambda: residual_chi2(torch.zeros(1, 4), torch.zeros(2, 4), 0.), ValueError, 'noise_std must be positive'),
    (lambda: residual_chi2(torch.zeros(1, 4), torch.zeros(2, 4), math.nan), ValueError, 'got nan'),
    (lambda: residual_chi2(torch.zeros(3, 4), torch.zeros(2, 4), 1.), ValueError, r'got \(3, 4\)'),
    (lambda: residual_chi2(torch.zeros(4), torch.zeros(4), 1.), ValueError, 'y must be'),
    (lambda: posterior_mean_error(torch.zeros(4), torch.tensor(0.)), ValueError, 'samples must be'),
    (lambda: posterior_mean_error(torch.zeros(4, 2), torch.zeros(3)), ValueError, r'got \(3,\)'),
    (lambda: sliced_wasserstein(torch.zeros(4, 2), torch.zeros(4, 3)), ValueError, 'of one shape'),
    (lambda: sliced_wasserstein(torch.zeros(0, 2), torch.zeros(4, 2)), ValueError, 'non-empty'),
    (lambda: sliced_wasserstein(torch.zeros(4, 2), torch.zeros(4, 2), 0), ValueError, 'n_projections'),
    (lambda: psnr(pixels.byte(), pixels), TypeError, 'got torch.uint8: divide bytes'),
    (lambda: psnr(pixels[0], pixels), ValueError, r'got \(3, 8, 8\) and \(2, 3, 8, 8\)'),
    (lambda: psnr(pixels, pixels[..., :4]), ValueError, r'\(2, 3, 8, 4\)'),
    (lambda: psnr(pixels, pixels, 1., 0.), ValueError, 'low must be below high, got 1.0 and 0.0'),
    (lambda: ssim(pixels, pixels), ValueError, r'at least 11 pixels for its window, got \(8, 8\)'),
    (lambda: LPIPS('no/such/file.pth'), FileNotFoundError, 'no weights at no/such/file.pth: pass weights=PATH'),
    (lambda: LPIPS(backbone='resnet'), ValueError, "'resnet' is no backbone of LPIPS: use one of vgg, alex, squeeze"),
    (lambda: LPIPS(chunk=0), ValueError, 'chunk must be at least 1, got 0'),
    (lambda: diversity(pixels[:1]), ValueError, r'at least two samples .* got shape \(1, 3, 8, 8\)'),
    (lambda: frechet_distance(pixels, pixels), ValueError, 'give `features`'),
    (lambda: frechet_distance(torch.zeros(1, 4), torch.zeros(3, 4)), ValueError, r'two or more vectors \(n, F\), got \(1, 4\)'),
    (lambda: frechet_distance(torch.zeros(5, 4), torch.zeros(3, 2)), ValueError, 'got 4 and 2'),
    (lambda: fid(pixels[:1], pixels), ValueError, 'at least two images in each set, got 1 and 2'),
    (lambda: fid(pixels[:, :2], pixels), ValueError, '1 or 3 channels, got 2'),
    (lambda: fid(pixels, pixels, 'no/such/file.pth'), FileNotFoundError, 'pass weights=PATH of weights-inception'),
    (lambda: seed_everything(-1), ValueError, 'got -1'),
    (lambda: seed_everything(1.5), ValueError, 'got 1.5'),
    (lambda: seed_everything(True), ValueError, 'got True'),
    (lambda: device_of('gpu'), ValueError, "'gpu' is no device"),
    (lambda: device_of('cuda:99'), ValueError, 'is not there'),
    (lambda: record(dict(net=torch.nn.Linear(1, 1)), {}), TypeError, 'params.net is a Linear'),
    (lambda: record({1: 2}, {}), TypeError, 'keys of params'),
    (lambda: record(dict(a='NaN'), {}), ValueError, "'NaN'"),
    (lambda: record({}, [1.]), TypeError, 'metrics must be a dict'),
    (lambda: run_record('unused', ['row'], 0, dict), TypeError, 'params must be a dict'),
    (lambda: read_records('no/such.jsonl'), FileNotFoundError, 'no/such.jsonl'),
    (lambda: table([]), ValueError, 'no records'),
    (lambda: table([record(dict(a=1), dict(b=2.))]), ValueError, "no parameter 'row'"),
    (lambda: table([record(dict(row=1), dict(b=2.))], columns=dict(C='c')), ValueError, 'there are b'),
]

@pytest.mark.parametrize('call, error, text', bad)
def test_bad_input_gets_one_clear_line(call, error, text):
    with pytest.raises(error, match=text) as e: call()
    assert '\n' not in str(e.value)

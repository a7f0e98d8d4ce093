"Distances against sums by hand and closed forms; a broken sample hides in no number"
import math, sys
import numpy as np, pytest, torch
from rtb_nb.distances import *

@pytest.fixture
def random_backbone(tmp_path):
    from torchvision.models import squeezenet1_1
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), tmp_path/'random.pth')
    return tmp_path/'random.pth'

# ---- an image beside its truth

def test_psnr_and_ssim_against_a_sum_by_hand():
    torch.manual_seed(0)
    x, y = (torch.rand(2, 1, 1, 11, 11).double()*2-1)
    w = torch.tensor([[math.exp(-((i-5)**2+(j-5)**2)/(2*1.5**2)) for j in range(11)]
                      for i in range(11)], dtype=torch.float64)
    w, a, b = w/w.sum(), x[0, 0]+1, y[0, 0]+1
    ma, mb = (w*a).sum(), (w*b).sum()
    va, vb, cov = (w*(a-ma)**2).sum(), (w*(b-mb)**2).sum(), (w*(a-ma)*(b-mb)).sum()
    by_hand = (2*ma*mb+.02**2)*(2*cov+.06**2)/((ma**2+mb**2+.02**2)*(va+vb+.06**2))
    decibels = 10*math.log10(4*121/((a-b)**2).sum().item())
    assert ssim(x, y).item() == pytest.approx(by_hand.item(), abs=1e-12)
    assert psnr(x, y).item() == pytest.approx(decibels, abs=1e-9)
    assert ssim(x, x).item() == pytest.approx(1) and math.isinf(psnr(x, x))

def test_psnr_and_ssim_against_skimage():
    from skimage.data import astronaut
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    torch.manual_seed(0)
    truth = torch.tensor(astronaut()[100:164, 100:148]).permute(2, 0, 1)[None]/127.5 - 1
    x = truth + torch.tensor([.02, .1, .4]).reshape(3, 1, 1, 1)*torch.randn(3, 3, 64, 48)
    kw = dict(data_range=2., channel_axis=0, gaussian_weights=True, sigma=1.5,
              use_sample_covariance=False)
    image = lambda v: v.double().numpy()
    similar = [structural_similarity(image(v)+1, image(truth[0])+1, **kw) for v in x]
    decibels = [peak_signal_noise_ratio(image(truth[0]), image(v), data_range=2.) for v in x]
    assert ssim(x, truth).tolist() == pytest.approx(similar, abs=1e-9)
    assert psnr(x, truth).tolist() == pytest.approx(decibels)
    assert torch.allclose(ssim(x, truth), ssim((x+1)/2, (truth+1)/2, 0., 1.))
    one_by_one = torch.cat([ssim(v[None], truth) for v in x])
    assert torch.allclose(ssim(x, truth), one_by_one, rtol=1e-9)

def test_lpips_is_its_formula_and_does_not_depend_on_the_batch(random_backbone):
    state = torch.get_rng_state()
    distance = LPIPS(random_backbone, 'squeeze', chunk=np.int64(2))
    assert torch.equal(state, torch.get_rng_state())
    assert not any(p.requires_grad for p in distance.parameters())
    x, truth = torch.rand(5, 1, 32, 32)*2-1, torch.rand(1, 1, 32, 32)*2-1
    whole = distance(x, truth)
    assert whole.shape == (5,) and (whole > 0).all()
    assert torch.allclose(whole, torch.cat([distance(v[None], truth) for v in x]), rtol=1e-5)
    column = lambda *v: torch.tensor(v).reshape(3, 1, 1)
    shift, scale = column(-.030, -.088, -.188), column(.458, .448, .450)
    layers = lambda v: distance.net.net((v.expand(1, 3, -1, -1)-shift)/scale)
    unit = lambda f: f/f.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10)
    state = distance.net.state_dict()
    heads = [state[k] for k in sorted(state)
             if k.startswith('lin') and not k.startswith('lins')]
    each = zip(layers(x[:1]), layers(truth), heads)
    by_hand = sum(((unit(a)-unit(b)).square()*h).sum(1).mean() for a, b, h in each)
    assert whole[0].item() == pytest.approx(by_hand.item(), rel=1e-4)

def test_feature_distance_counts_all_channels_alike(random_backbone, tmp_path):
    from safetensors.torch import save_file
    torch.manual_seed(1)
    x, truth = torch.rand(3, 3, 32, 32)*2-1, torch.rand(1, 3, 32, 32)*2-1
    distance = FeatureDistance(random_backbone, 'squeeze')
    found = distance(x, truth)
    column = lambda *v: torch.tensor(v).reshape(3, 1, 1)
    shift, scale = column(-.030, -.088, -.188), column(.458, .448, .450)
    layers = lambda v: distance.net.net((v-shift)/scale)
    unit = lambda f: f/f.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10)
    each = zip(layers(x), layers(truth))
    by_hand = sum((unit(a)-unit(b)).square().sum(1).mean((1, 2)) for a, b in each)
    assert torch.allclose(found, by_hand, rtol=1e-4)
    weights = torch.load(random_backbone, weights_only=True)
    save_file({k: v for k, v in weights.items() if k.startswith('features')},
              tmp_path/'trunk.safetensors')
    again = FeatureDistance(tmp_path/'trunk.safetensors', 'squeeze')
    assert torch.equal(again(x, truth), found)
    assert not torch.allclose(LPIPS(random_backbone, 'squeeze')(x, truth), found)

def test_lpips_finds_the_cache_and_says_what_is_missing(random_backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    wanted = 'pass weights=PATH of vgg16-397923af.pth, to be had from https'
    with pytest.raises(FileNotFoundError, match=wanted): LPIPS()
    (tmp_path/'checkpoints').mkdir()
    random_backbone.rename(tmp_path/'checkpoints'/'squeezenet1_1-b8a52dc0.pth')
    blank = torch.zeros(1, 3, 32, 32)
    assert LPIPS(backbone='squeeze')(blank, blank).item() == 0
    with pytest.raises(FileNotFoundError, match='weights-inception'):
        fid(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))
    (tmp_path/'torn.pth').write_bytes(b'PK torn')
    torch.save({'a': torch.zeros(1)}, tmp_path/'other.pth')
    for file, text in (('torn', 'no readable weight file .* fetch squeezenet1_1'),
                       ('other', "'features.0.weight' is missing")):
        path = tmp_path/f'{file}.pth'
        with pytest.raises(ValueError, match=text) as e: LPIPS(path, 'squeeze')
        assert '\n' not in str(e.value)

def test_weights_are_found_at_home(random_backbone, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    LPIPS('~/random.pth', 'squeeze')
    assert not (tmp_path/'~').exists()

# ---- sets of samples

def test_sliced_wasserstein_is_a_distance():
    torch.manual_seed(0)
    a, b, c = torch.randn(60, 3), torch.randn(90, 3)+1, torch.randn(45, 3)*2
    d = sliced_wasserstein
    assert d(a, b).item() == pytest.approx(d(b, a).item())
    assert d(a, a[torch.randperm(60)]) < 1e-9 and d(a, c) <= d(a, b) + d(b, c)
    assert torch.equal(d(a, b, seed=3), d(a, b, seed=3)) and d(a, b, seed=3) != d(a, b, seed=4)
    x, y = torch.rand(7, 1).double(), torch.rand(5, 1).double()
    quantile = lambda v, u: v.sort(0).values[(u*len(v)).long().clamp(max=len(v)-1), 0]
    u = (torch.arange(70_000)+.5)/70_000
    exact = (quantile(x, u)-quantile(y, u)).square().mean().sqrt().item()
    assert d(x, y).item() == pytest.approx(exact, rel=1e-3)

def test_a_floor_is_the_mean_over_pairs():
    torch.manual_seed(0)
    sets = torch.randn(4, 20, 3)
    each = [sliced_wasserstein(sets[j], sets[i]).item() for i in range(4) for j in range(i)]
    assert sliced_floor(sets).item() == pytest.approx(sum(each)/6, rel=1e-12)

@pytest.mark.parametrize('n, m, f', [(50, 80, 5), (6, 9, 12), (4, 90, 7)])
def test_frechet_distance_against_a_matrix_root(n, m, f):
    from scipy.linalg import sqrtm
    torch.manual_seed(f)
    x = torch.randn(n, f).double()*torch.rand(f)
    y = torch.randn(m, f).double()@torch.randn(f, f).double() + 1
    C1, C2 = (v.T.cov().numpy() for v in (x, y))
    means = ((x.mean(0)-y.mean(0))**2).sum().item()
    exact = means + np.trace(C1+C2) - 2*np.trace(np.real(sqrtm(C1@C2)))
    assert frechet_distance(x, y).item() == pytest.approx(exact, rel=1e-5)
    assert frechet_distance(x, y).item() == pytest.approx(frechet_distance(y, x).item())
    assert frechet_distance(x, x) < 1e-9
    first = frechet_distance(x[:, :3], y[:, :3])
    assert torch.allclose(frechet_distance(x, y, lambda v: v[:, :3], chunk=3), first)

def test_frechet_distance_of_gaussians_tends_to_the_closed_form():
    torch.manual_seed(0)
    s, t = torch.tensor([1., 2., .5]), torch.tensor([2., 2., 1.5])
    draw = lambda scale: scale*torch.randn(20_000, 3)
    found = [frechet_distance(draw(s), 1+draw(t)).item() for _ in range(3)]
    assert np.mean(found) == pytest.approx(3+((s-t)**2).sum().item(), rel=.02)

def test_fid_without_torch_fidelity_says_what_to_install(random_backbone, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_fidelity', None)
    with pytest.raises(ImportError, match='pip install torch-fidelity'):
        fid(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8), random_backbone)

def test_fid_hands_bytes_to_torch_fidelity(random_backbone, monkeypatch):
    seen = {}
    pretend = type(sys)('torch_fidelity')
    answer = dict(frechet_inception_distance=1.5)
    pretend.calculate_metrics = lambda **kw: seen.update(kw) or answer
    monkeypatch.setitem(sys.modules, 'torch_fidelity', pretend)
    x = torch.tensor([-1., 0, 1, 7]).reshape(1, 1, 2, 2).expand(3, 1, 2, 2)
    assert fid(x, x[:2], random_backbone) == 1.5 and seen['fid']
    assert seen['feature_extractor_weights_path'] == str(random_backbone)
    one, two = seen['input1'], seen['input2']
    assert len(one) == 3 and len(two) == 2 and isinstance(one, torch.utils.data.Dataset)
    assert one[0].dtype == torch.uint8 and one[0].shape == (3, 2, 2)
    assert one[0][2].flatten().tolist() == [0, 128, 255, 255]

# ---- modes

def test_modes_are_counted():
    means, weights = torch.eye(3), torch.tensor([.6, .39, .01]).double()
    x = torch.eye(3)[[0]*6 + [1]*4] + .01
    share = mode_weights(x, means)
    assert share.tolist() == [.6, .4, 0]
    assert total_variation(share, weights).item() == pytest.approx(.01, rel=1e-5)
    sets = torch.randn(4, 10, 3, generator=torch.Generator().manual_seed(0))
    found = score_modes(x, sets, means, weights)
    assert found['modes'] == found['exact_modes'] == 2 # nobody asks for a mode of one percent
    assert found['tv'] == pytest.approx(.01, rel=1e-5)
    assert found['sw_floor'] == pytest.approx(sliced_floor(sets).item())
    far = torch.stack([sliced_wasserstein(x, s) for s in sets])
    assert found['sw'] == pytest.approx((far[0]/sliced_floor(sets)).item())
    every = score_modes(x, sets, means, weights, floor=2., against=4, least=0.)
    assert every['sw'] == pytest.approx((far.mean()/2).item()) and every['sw_floor'] == 2
    assert every['modes'] == 2 and every['exact_modes'] == 3

# ---- broken samples

def broken(shape, value, at=0):
    x = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)
    x[at].view(-1)[-1] = value
    return x

@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_broken_sample_hides_in_no_number(value, random_backbone):
    points, fine = broken((9, 2), value), torch.rand(9, 2)
    images, good = broken((3, 1, 32, 32), value), torch.rand(3, 1, 32, 32)
    means = torch.rand(4, 2)
    assert mode_weights(points, means).isnan().all()
    assert total_variation(mode_weights(points, means), [.25]*4).isnan()
    assert sliced_wasserstein(points, fine).isnan() and sliced_wasserstein(fine, points).isnan()
    assert frechet_distance(points, fine).isnan()
    deaf = lambda v: torch.nan_to_num(v).flatten(1)[:, :2]
    assert frechet_distance(images, good, deaf).isnan()
    assert math.isnan(fid(images, good)) and math.isnan(fid(good, images))
    assert psnr(images, good).isnan().tolist() == [True, False, False]
    assert ssim(images, good).isnan().tolist() == [True, False, False]
    apart = LPIPS(random_backbone, 'squeeze')(images, good)
    assert apart.isnan().tolist() == [True, False, False]
    found = score_modes(points, torch.rand(3, 9, 2), means, [.25]*4)
    assert all(math.isnan(found[k]) for k in ('tv', 'sw', 'modes'))
    assert found['exact_modes'] == 4 and found['sw_floor'] > 0

# ---- bad input: one line that names the value

pixels, points = torch.zeros(2, 3, 8, 8), torch.zeros(4, 2)
labels, sets, half = torch.tensor([0, 1]), torch.rand(3, 4, 2), torch.tensor([.5, .5])
def score(**kw): return score_modes(points, sets, points, [.25]*4, **kw)
bad = [
    (lambda: sliced_wasserstein(points, torch.zeros(4, 3)), ValueError, 'of one shape'),
    (lambda: sliced_wasserstein(points[:0], points), ValueError, 'non-empty'),
    (lambda: sliced_wasserstein(points, points, 0), ValueError, 'n_projections must .* got 0'),
    (lambda: sliced_wasserstein(points, points, seed=-1), ValueError, 'seed must .* got -1'),
    (lambda: sliced_floor(points), ValueError, r'two sets or more .* got \(4, 2\)'),
    (lambda: sliced_floor(sets[:1]), ValueError, r'got \(1, 4, 2\)'),
    (lambda: psnr(pixels.byte(), pixels), TypeError, 'got torch.uint8: divide bytes'),
    (lambda: psnr(pixels[0], pixels), ValueError, r'got \(3, 8, 8\) and \(2, 3, 8, 8\)'),
    (lambda: psnr(pixels, torch.tensor(0.)), ValueError, r'\(2, 3, 8, 8\) and \(\)'),
    (lambda: psnr(pixels, pixels[..., :4]), ValueError, r'\(2, 3, 8, 4\)'),
    (lambda: psnr(pixels, pixels, 1., 0.), ValueError, 'must be below high, got 1.0 and 0.0'),
    (lambda: psnr(pixels, pixels, 'black'), ValueError, "low must be .* got 'black'"),
    (lambda: ssim(pixels, pixels), ValueError, r'11 pixels for its window, got \(8, 8\)'),
    (lambda: LPIPS('no/such/file.pth'), FileNotFoundError, 'file.pth: pass weights=PATH'),
    (lambda: LPIPS(backbone='resnet'), ValueError, "'resnet' is no .* use one of vgg, alex"),
    (lambda: LPIPS(chunk=0), ValueError, 'chunk must be a positive whole number, got 0'),
    (lambda: frechet_distance(pixels, pixels), ValueError, 'give `features`'),
    (lambda: frechet_distance(points[:1], points), ValueError, r'\(n, F\), got \(1, 2\)'),
    (lambda: frechet_distance(points, torch.zeros(3, 5)), ValueError, 'got 2 and 5'),
    (lambda: frechet_distance(points, points, chunk=0), ValueError, 'chunk must .* got 0'),
    (lambda: fid(pixels[:1], pixels), ValueError, 'two images in each set, got 1 and 2'),
    (lambda: fid(pixels[:, :2], pixels), ValueError, '1 or 3 channels, got 2'),
    (lambda: fid(pixels, pixels, 'no/file.pth'), FileNotFoundError, 'PATH of weights'),
    (lambda: fid(pixels, pixels, chunk=1.5), ValueError, 'chunk must .* got 1.5'),
    (lambda: train_classifier(pixels, labels[:1]), ValueError, r'\(2, 3, 8, 8\) and \(1,\)'),
    (lambda: train_classifier(pixels, labels-1), ValueError, 'count from 0 .* got -1 to 0'),
    (lambda: train_classifier(pixels*math.nan, labels), ValueError, '384 pixels .* not finite'),
    (lambda: train_classifier(pixels, labels, steps=0), ValueError, 'steps must .* got 0'),
    (lambda: train_classifier(pixels, labels, width=12), ValueError, 'multiple of 8, got 12'),
    (lambda: mode_weights(points, torch.zeros(3, 5)), ValueError, r'\(4, 2\) and \(3, 5\)'),
    (lambda: mode_weights(points[:0], points), ValueError, r'one value .* \(0, 2\)'),
    (lambda: mode_weights(points, points*math.nan), ValueError, 'a mode is not finite'),
    (lambda: total_variation(half, [1., 0., 0.]), ValueError, r'got \(2,\) and \(3,\)'),
    (lambda: total_variation(half, [.5, .4]), ValueError, 'got a sum of 0.9'),
    (lambda: total_variation(half, [1.5, -.5]), ValueError, 'a smallest of -0.5'),
    (lambda: score(against=4), ValueError, 'against must .* from 1 to 3, got 4'),
    (lambda: score(floor=0), ValueError, 'floor must .* got 0'),
    (lambda: score(least=1), ValueError, r'least must lie in \[0, 1\), got 1'),
]

@pytest.mark.parametrize('call, error, text', bad)
def test_bad_input_gets_one_clear_line(call, error, text):
    with pytest.raises(error, match=text) as e: call()
    assert '\n' not in str(e.value)

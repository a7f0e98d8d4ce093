"Every experiment runs through papermill at its smallest budget, outside the repository"
import json, shutil

import numpy as np, papermill, pytest

from project import LIB, benchmarks, experiments, name

def stamps(folder):
    "A small stack of round blobs in place of the galaxies, which a fresh clone does not have"
    y, x = np.mgrid[:64, :64]
    width = np.random.default_rng(0).uniform(3, 9, 24)[:, None, None]
    blobs = (255*np.exp(-((x-32)**2 + (y-32)**2)/2/width**2)).astype(np.uint8)
    np.savez(folder/'stamps.npz', train=blobs[:16], test=blobs[16:])
    return folder/'stamps.npz'

def digits(folder, n=610):
    "Blobs in place of digits, `n` to test with: the wide ones are called 1"
    y, x = np.mgrid[:28, :28]
    width = np.random.default_rng(0).uniform(2, 6, n)
    blobs = (255*np.exp(-((x-14)**2 + (y-14)**2)/2/width[:, None, None]**2)).astype(np.uint8)
    labels = (width > 4).astype(int)
    np.savez(folder/'mnist.npz', train=blobs[:64], test=blobs,
             train_labels=labels[:64], test_labels=labels)
    return folder/'mnist.npz'

def photographs(folder):
    "Two of noise, to test with"
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.savez(folder/'cifar10.npz', train=noise, test=noise)
    return folder/'cifar10.npz'

def own_priors(folder):
    "What is shipped for digits, as files of one's own"
    for file in (LIB/'assets').glob('*mnist-32.*'): shutil.copy(file, folder)
    return folder

def lens_image(folder):
    "A ring on a bright sky, as a FITS file"
    from astropy.io import fits
    r = np.hypot(*(np.indices((64, 64)) - 31.5))
    noise = np.random.default_rng(0).normal(size=(64, 64))
    fits.PrimaryHDU(100 + 50*np.exp(-((r-16)/4)**2/2) + noise).writeto(folder/'lens.fits')
    return folder/'lens.fits'

# The smallest runs of each experiment; one that is not named has one, budget='smoke'.
# A function makes the value from a folder.
SMALLEST = {'exp_priors': [dict(dataset='galaxies', data=stamps),
                           dict(dataset='galaxies', data=stamps, begin='sources-32'),
                           dict(dataset='mnist', data=lambda folder: digits(folder, 64))],
            'exp_conditional': [dict(data=lambda folder: digits(folder).parent), dict(
                data=lambda folder: digits(folder).parent, tasks='deblur',
                methods=['FPS', 'FPS-SMC', 'RTB, log Z(y)', 'RTB+DPS+CLA'])],
            'exp_consistency': [dict(methods=['CLA', 'covariance matching',
                                              'refined on each'])],
            'exp_latent': [{}, dict(decoder='straight',
                                    methods=['PSLD', 'guidance', 'amortised, refined'])],
            'exp_lavps': [dict(data=lambda folder: digits(folder).parent)],
            'exp_posteriors': [{}, *(dict(family=damage,
                                          data=lambda folder: digits(folder).parent)
                                     for damage in ('losses', 'shakes', 'bends')),
                               dict(family='holes', prior_name='cifar10-32',
                                    data=lambda folder: photographs(folder).parent)],
            'exp_ood': [dict(data=lambda folder: digits(folder).parent), dict(
                data=lambda folder: digits(folder).parent, train=2, begin='mnist-box',
                methods='supervised', shifts='half images')],
            'exp_unconditional': [dict(data=lambda folder: digits(folder).parent, tasks=tasks,
                                       priors=priors)
                                  for tasks, priors in ((['box', 'phase'], ''),
                                                        (['random', 'deblur'], own_priors))],
            'tutorials/2_undo_a_lens': [dict(
                path=lens_image, iterations=1, own_iterations=1, n_samples=3,
                save_to=lambda folder: folder/'source.fits')]}
RUNS = [(p, values) for p in experiments() for values in SMALLEST.get(name(p), [{}])]

def parameters(notebook, values, out):
    "The values above, which the notebook must declare, and a folder of its own for its results"
    declared = set(papermill.inspect_notebook(notebook))
    values = {k: str(v(out)) if callable(v) else v for k, v in values.items()}
    if 'budget' in declared: values = dict(budget='smoke') | values
    unknown = set(values) - declared
    assert not unknown, (f'{notebook.name} has no parameter {sorted(unknown)}: its parameters '
                         f'cell declares {sorted(declared)}, one `name = value` per line')
    return values | ({'out': str(out)} if 'out' in declared else {})

def execute(notebook, out, **options):
    papermill.execute_notebook(notebook, out, cwd=out.parent, progress_bar=False, **options)

def label(run): return f'{name(run[0])}-{run[1].get("dataset", "smoke")}'

@pytest.mark.parametrize('notebook, values', RUNS, ids=map(label, RUNS))
def test_experiment(notebook, values, tmp_path):
    out, results = tmp_path/'out.ipynb', tmp_path/'results'
    results.mkdir()
    execute(notebook, out, parameters=parameters(notebook, values, results))
    cells = [c for c in json.loads(out.read_text())['cells'] if c['cell_type'] == 'code']
    assert any(c['outputs'] for c in cells), f'{notebook.name} showed nothing'

def test_comparison_with_peers(tmp_path):
    for library in ('deepinv', 'azula'): pytest.importorskip(library)
    notebook = next(p for p in benchmarks() if name(p) == 'bench_peers')
    execute(notebook, tmp_path/'out.ipynb', parameters=dict(budget='smoke'))

"Images from files and data sets: what is read, and what is refused"
import struct
import zlib
from pathlib import Path
import numpy as np
import pytest
import torch
from rtb_nb.data import (augment, data_path, dataset_array, hubble_sources, load_galaxies,
                         load_labels, load_mnist, load_source, load_stack, mirror, read_image,
                         shrink, to_signed)


def saved(folder, array, name='image.npy'):
    np.save(folder/name, array)
    return folder/name


def fits(folder, array, name='image.fits', hdus=()): # hdus: (name, array) of extensions
    from astropy.io import fits
    primary = fits.PrimaryHDU(None if array is None else np.asarray(array))
    found = fits.HDUList([primary, *(fits.ImageHDU(np.asarray(a), name=n) for n, a in hdus)])
    found.writeto(folder/name)
    return folder/name


def png(folder, array, name='image.png'): # 8 or 16 bits, (H, W) or (H, W, 2 to 4)
    depth = 8*array.dtype.itemsize
    kind = 0 if array.ndim == 2 else {2: 4, 3: 2, 4: 6}[array.shape[-1]]
    rows = b''.join(b'\0' + row.astype(f'>u{depth//8}').tobytes() for row in array)
    number = lambda n: struct.pack('>I', n)
    chunk = lambda t, b: number(len(b)) + t + b + number(zlib.crc32(t + b))
    head = struct.pack('>IIBBBBB', array.shape[1], array.shape[0], depth, kind, 0, 0, 0)
    data = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    (folder/name).write_bytes(b'\x89PNG\r\n\x1a\n' + data)
    return folder/name


def galaxy(n=48, sigma=5., bright=200., noise=0., seed=0):
    r2 = ((np.indices((n, n)) - n/2)**2).sum(0)
    sky = np.random.default_rng(seed).normal(100, noise, (n, n))
    return bright*np.exp(-r2/2/sigma**2) + sky


def with_hot_pixels(im):
    im = im.copy()
    im[3, 5] = im[40, 12] = 1e5
    return im


class Text:
    def __init__(self, text): self.text = text
    def write(self, folder, name):
        (folder/name).write_text(self.text)
        return folder/name


ones = torch.zeros(2, 1, 6, 6)
bad_input = {
    'index': (lambda d: load_source(57), 'source must be a whole number from 0 to 56, got 57'),
    'negative index': (lambda d: load_source('-1'), 'from 0 to 56, got -1'),
    'half an index': (lambda d: load_source(1.5), 'got 1.5: give an index into the deep field'),
    'no source': (lambda d: load_source(None), 'got None: give an index'),
    'suffix': (lambda d: load_source('galaxy.jpg'),
               "suffix '.jpg': give a .npy, .png or .fits"),
    'missing': (lambda d: load_source('galaxy.png'), 'no file galaxy.png: give the path'),
    'missing at home': (lambda d: load_source('~/nowhere.fits'),
                        f'no file {Path.home()}/nowhere'),
    'a folder': (lambda d: ((d/'a.fits').mkdir(), load_source(d/'a.fits')), 'no file '),
    'four axes': (lambda d: load_source(saved(d, np.zeros((2, 3, 4, 5)))),
                  'shape (2, 3, 4, 5)'),
    'a cube': (lambda d: load_source(fits(d, np.zeros((7, 9, 9)))),
               'shape (7, 9, 9): give one'),
    'nan pixel': (lambda d: load_source(saved(d, np.full((9, 9), np.nan))),
                  '81 pixels that are not finite: repair them'),
    'inf in fits': (lambda d: load_source(fits(d, np.full((9, 9), np.inf))),
                    '81 pixels that are'),
    'constant': (lambda d: load_source(saved(d, np.full((40, 40), 7.))), 'constant at 7'),
    'dark centre': (lambda d: load_source(saved(d, -np.pad(np.ones((20, 20)), 9))),
                    'nowhere brighter than its border (0): leave sky'),
    'noise alone': (lambda d: load_source(saved(d, galaxy(bright=0., noise=3.))),
                    'shows nothing, no five pixels together'),
    'hot pixels': (lambda d: load_source(saved(d, with_hot_pixels(galaxy(bright=0., noise=3)))),
                   'shows nothing'),
    'tiny': (lambda d: load_source(0, size=4),
             'size must be a whole number of at least 8, got 4'),
    'half a size': (lambda d: load_source(0, size=32.5), 'got 32.5: pixels per side'),
    'gamma': (lambda d: load_source(0, gamma=-2), 'gamma must be a positive number, got -2'),
    'peak': (lambda d: load_source(0, peak=1.5), 'peak must lie in (0, 1], got 1.5'),
    'hdu of Hubble': (lambda d: load_source(0, hdu='SCI'), "hdu 'SCI' is of a FITS file"),
    'hdu of npy': (lambda d: read_image(saved(d, np.eye(9)), hdu=1),
                   'no extensions, got hdu 1'),
    'hdu name': (lambda d: read_image(fits(d, None, hdus=[('ERR', np.eye(9))]), hdu='SCI'),
                 "hdu 'SCI' does not exist: the file has 0 PRIMARY, 1 ERR"),
    'hdu number': (lambda d: read_image(fits(d, np.eye(9)), hdu=4), 'hdu 4 does not exist'),
    'hdu type': (lambda d: read_image(fits(d, np.eye(9)), hdu=1.5),
                 'hdu must be a whole number'),
    'hdu empty': (lambda d: read_image(fits(d, None), hdu=0),
                  'hdu 0 is no image: name another'),
    'only errors': (lambda d: read_image(fits(d, None, hdus=[('ERR', np.eye(9))])),
                    'no science image among 0 PRIMARY, 1 ERR: name one with hdu='),
    'no fits': (lambda d: read_image(Text('hello').write(d, 'a.fits')), 'it is no FITS file'),
    'no png': (lambda d: read_image(Text('hello').write(d, 'a.png')), 'it is no picture'),
    'no npy': (lambda d: read_image(Text('hello').write(d, 'a.npy')), 'is no array of numbers'),
    'complex': (lambda d: read_image(saved(d, np.eye(9)*1j)),
                'must be numbers, got dtype complex'),
    'alpha': (lambda d: read_image(saved(d, np.full((8, 8, 4), 2.))),
              'alpha must lie in [0, 1]'),
    'path type': (lambda d: read_image(7), 'a path is needed, got int 7'),
    'no galaxies': (lambda d: load_galaxies(path=d/'stamps.npz'), 'stamps.npz'),
    'split': (lambda d: load_galaxies('valid'), "split is 'train' or 'test', got 'valid'"),
    'digits split': (lambda d: load_mnist('valid'), "got 'valid'"),
    'data set': (lambda d: load_labels('MINST'), "no data set 'MINST': try MNIST"),
    'no such array': (lambda d: (np.savez(d/'a.npz', test=1), load_stack(d/'a.npz')),
                      "'a.npz' has no array 'train': it holds test"),
    'stack suffix': (lambda d: load_stack('a.csv'), "suffix '.csv'"),
    'stack range': (lambda d: load_stack(saved(d, np.eye(8)[None]*300)), '[0, 300]'),
    'stack axes': (lambda d: load_stack(saved(d, np.eye(8))), 'got shape (8, 8)'),
    'stack path': (lambda d: load_stack(3), 'a path is needed, got int 3'),
    'text': (lambda d: to_signed(np.array([[['a']]])), 'dtype <U1'),
    'bits': (lambda d: to_signed(np.eye(8, dtype=int)[None]), 'whole numbers up to 1'),
    'divisor': (lambda d: shrink(torch.zeros(1, 1, 64, 64), 24), 'size 24 does not divide 64'),
    'no size': (lambda d: shrink(ones, 0), 'size must be a positive whole number, got 0'),
    'three sizes': (lambda d: shrink(ones, (1, 2, 3)), 'one number or (height, width)'),
    'stretch': (lambda d: shrink(torch.zeros(1, 1, 48, 64), 16),
                'would stretch images of (48, 64)'),
    'augment axes': (lambda d: augment(torch.zeros(4, 5)),
                     'takes images (B, C, H, W), got (4, 5)'),
}


@pytest.mark.parametrize('name', bad_input)
def test_bad_input(name, tmp_path):
    call, message = bad_input[name]
    with pytest.raises((ValueError, TypeError)) as e: call(tmp_path)
    assert message in str(e.value) and '\n' not in str(e.value)


def test_one_image_in_all_formats_is_one_source(tmp_path):
    im = np.zeros((48, 48), np.uint8)
    im[12:30, 20:31] = 200
    expected = load_source(saved(tmp_path, im), 16)
    files = [png(tmp_path, im), png(tmp_path, np.stack([im]*3, -1), 'colour.PNG'),
             png(tmp_path, im.astype(np.uint16)*256, 'deep.png'),
             png(tmp_path, np.stack([im, np.full_like(im, 255)], -1), 'opaque.png')]
    endings = 'fits', 'FITS', 'fit', 'fts', 'Fits.gz', 'fit.gz'
    files += [fits(tmp_path, im.astype(np.float32), f'{i}.{e}') for i, e in enumerate(endings)]
    for path in files: assert torch.equal(load_source(path, 16), expected), path


def test_deep_png_keeps_all_its_levels(tmp_path):
    im = (np.arange(64*64).reshape(64, 64)*16).astype(np.uint16)
    assert np.array_equal(read_image(png(tmp_path, im)), im)


@pytest.mark.parametrize('names, science', [
    (['ERR', 'SCI'], 'SCI'), (['DQ', 'sci', 'SCI'], 'sci'), (['VAR_POISSON', 'F814W'], 'F814W'),
    (['WHT', 'image_mask', 'FLUXERR', 'FLUX'], 'FLUX'), (['IVAR', 'CONTINUUM'], 'CONTINUUM'),
    (['SIGNAL', 'ERR'], 'SIGNAL')], ids=str)
def test_science_is_found_by_name(tmp_path, names, science):
    images = [(n, np.full((8, 8), float(i))) for i, n in enumerate(names)]
    path = fits(tmp_path, None, hdus=images)
    assert (read_image(path) == names.index(science)).all()
    for i, name in enumerate(names): assert (read_image(path, hdu=i+1) == i).all()
    assert (read_image(path, hdu=np.int64(1)) == 0).all()
    assert (read_image(path, hdu=names[0]) == 0).all()


def test_a_primary_image_comes_first_and_axes_of_one_are_dropped(tmp_path):
    path = fits(tmp_path, np.eye(8)[None, None], hdus=[('ERR', np.zeros((8, 8)))])
    assert np.array_equal(read_image(path), np.eye(8))


def test_the_hdu_of_a_source(tmp_path):
    square = np.pad(np.ones((16, 16)), 8)
    moved = np.roll(square, 3, 0)
    path = fits(tmp_path, None, hdus=[('SCI', square), ('MODEL', moved)])
    for hdu, im in ((None, square), ('MODEL', moved)):
        x = load_source(path, hdu=hdu)[0, 0].double()
        assert torch.equal(x, torch.from_numpy(im)*2 - 1)


def test_transparent_pixels_are_black(tmp_path):
    rgba = np.full((8, 8, 4), 200, np.uint8)
    rgba[..., 3] = 255*(np.arange(8) < 4)
    wanted = np.tile([200.]*4 + [0.]*4, (8, 1))
    assert np.array_equal(read_image(png(tmp_path, rgba)), wanted)
    assert np.array_equal(read_image(png(tmp_path, rgba[..., 2:], 'grey.png')), wanted)
    assert np.allclose(read_image(saved(tmp_path, rgba/255)), wanted/255)
    from PIL import Image
    palette = Image.new('P', (8, 8))
    palette.putpalette([0, 0, 0, 90, 90, 90]*128)
    palette.putdata([1, 0]*32)
    palette.save(tmp_path/'palette.png', transparency=1)
    assert not read_image(tmp_path/'palette.png').any()


@pytest.mark.parametrize('size', [16, 48, 64])
def test_a_galaxy_keeps_its_scale_beside_hot_pixels(tmp_path, size):
    im = galaxy(noise=2.)
    clean = load_source(saved(tmp_path, im), size)
    hot = load_source(saved(tmp_path, with_hot_pixels(im), 'hot.npy'), size)
    assert clean.max() == 1 and (clean - hot).abs().median() < 1e-6


def test_a_galaxy_fainter_than_its_pixels_noise_is_seen_once_it_is_averaged(tmp_path):
    im = galaxy(512, 60., 20., noise=10.)
    x = load_source(saved(tmp_path, im), 32)
    assert x.max() == 1 and x[..., 14:18, 14:18].min() > .5


def test_home_is_expanded_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    np.savez(tmp_path/'few.npz', train=np.full((2, 28, 28), 255, np.uint8), train_labels=[3, 4])
    saved(tmp_path, galaxy())
    np.save(tmp_path/'stack.npy', np.random.default_rng(0).random((2, 64, 64)))
    assert load_source('~/image.npy').shape == (1, 1, 32, 32)
    assert load_stack('~/stack.npy').shape == (2, 1, 32, 32)
    assert len(load_mnist(path='~/few.npz')) == 2
    assert len(load_galaxies('train', 28, '~/few.npz')) == 2
    assert dataset_array('MNIST', 'train_labels', '~/few.npz').tolist() == [3, 4]
    monkeypatch.setenv('RTB_NB_DATA', '~/data')
    assert data_path('a.npz') == tmp_path/'data'/'a.npz'
    monkeypatch.delenv('RTB_NB_DATA')
    assert data_path() == tmp_path/'.cache'/'rtb_nb'
    assert not Path('~').exists()


def test_numbers_of_any_type():
    x = load_source(0)
    for index in (np.int64(0), torch.tensor(0), '0'): assert torch.equal(load_source(index), x)
    assert torch.equal(load_source(0, np.int32(32), torch.tensor(1.), np.float32(1)), x)
    assert shrink(torch.zeros(1, 1, 8, 8), np.int64(4)).shape[-1] == 4


def test_oblongs():
    x = torch.arange(24.).reshape(1, 1, 4, 6)
    assert torch.equal(shrink(x, (2, 3))[0, 0, 0], torch.tensor([3.5, 5.5, 7.5]))
    torch.manual_seed(0)
    seen = augment(x.expand(400, 1, 4, 6)).flatten(1).unique(dim=0)
    assert len(seen) == 4
    assert mirror(x.expand(9, 1, 4, 6)).shape == (9, 1, 4, 6)


def test_augment_is_seeded_and_keeps_pixels():
    x = torch.rand(50, 1, 6, 6)
    torch.manual_seed(3); a = augment(x)
    torch.manual_seed(3); b = augment(x)
    assert torch.equal(a, b)
    assert torch.equal(a.flatten(1).sort().values, x.flatten(1).sort().values)


def test_hubble_sources_fill_the_range():
    for i in range(len(hubble_sources())):
        x = load_source(i)
        assert x.shape == (1, 1, 32, 32) and x.min() == -1 and x.max() == 1
        assert x.isfinite().all()

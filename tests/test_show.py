"What the plots draw: contours from samples, maps with units, limits of colours"
import base64
import nbclient, nbformat
import numpy as np
import pytest, torch
from matplotlib import pyplot as plt
from rtb_nb import show
from rtb_nb.maps import show_maps

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def test_axes_have_labels_that_can_be_changed():
    x = torch.randn(50, 2)
    ax = show.show_samples(prior=x)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('first coordinate', 'second coordinate')
    assert show.show_samples(prior=x, xlabel='', ylabel='y').get_xlabel() == ''

@pytest.mark.parametrize('contours', ['exact', ['exact']])
def test_samples_become_contours(contours):
    torch.manual_seed(0)
    x = {'exact': torch.randn(300, 2), 'learned': torch.randn(300, 2)}
    ax = show.show_samples(x, contours=contours)
    lines = [c for c in ax.collections if type(c).__name__ == 'QuadContourSet']
    dots = [c for c in ax.collections if type(c).__name__ == 'PathCollection']
    assert len(lines) == len(dots) == 1
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {'exact', 'learned'}

def test_contours_of_no_row_are_refused():
    with pytest.raises(ValueError, match="contours names"):
        show.show_samples(exact=torch.randn(9, 2), contours=['truth'])

def test_the_density_of_samples_is_that_of_their_law():
    torch.manual_seed(0)
    cov = torch.tensor([[1., .8], [.8, 1.]])
    law = torch.distributions.MultivariateNormal(torch.tensor([3., 0.]), cov)
    found = show.smoothed(law.sample((2000,)))
    g = torch.linspace(-4, 4, 161)
    points = torch.cartesian_prod(g+3, g)
    assert found(points).exp().sum().item()/20**2 == pytest.approx(1, abs=.02)
    middle = law.sample((200,))
    middle = middle[law.log_prob(middle) > law.log_prob(law.mean) - 1]
    assert (found(middle) - law.log_prob(middle)).abs().mean() < .25

def test_two_coordinates_that_are_one_still_have_a_density():
    x = torch.randn(100, 1).expand(100, 2)
    assert show.smoothed(x)(x).isfinite().all()

def test_colours_are_even_about_zero_where_the_map_is():
    im = np.array([[-1., 3.], [np.nan, 0.]])
    assert show.colour_limits(im, cmap='gray') == (-1, 3)
    assert show.colour_limits(im, cmap='coolwarm') == (-3, 3)
    assert show.colour_limits(im, vmin=-2, cmap='RdBu') == (-2, 2)
    assert show.colour_limits(im, -1, 4, 'coolwarm') == (-1, 4)
    assert show.colour_limits(np.full((2, 2), np.nan)) == (0, 1)

def test_an_extent_brings_ticks_units_and_curves():
    curve = torch.tensor([[0., 0.], [5., 5.]]) # leaves the image, which keeps its limits
    axes = show.show_images(torch.zeros(2, 1, 8, 8), extent=[1.5, None], unit='kpc',
                            curves=[[curve, curve], None], colorbar='counts')
    ruled, plain = axes.flat
    assert (ruled.get_xlim(), ruled.get_ylim()) == ((-1.5, 1.5), (1.5, -1.5))
    assert ruled.get_xlabel() == 'kpc' and len(ruled.get_xticks()) and len(ruled.lines) == 4
    assert not len(plain.get_xticks()) and plain.get_xlabel() == '' and not plain.lines
    bars = [ax.get_ylabel() for ax in ruled.figure.axes if ax not in (ruled, plain)]
    assert bars == ['counts', 'counts']

def test_a_whole_extent_is_taken_as_it_is():
    ax, = show.show_images(torch.zeros(1, 1, 8, 8), extent=[(0, 2, 0, 1)]).flat
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 2), (0, 1))

def test_rows_may_have_units_of_their_own():
    x = torch.zeros(2, 1, 8, 8)
    axes = show.show_rows({'source': x, 'seen': x[:1]}, extent={'source': 1., 'seen': 3.})
    assert axes[0, 1].get_xlim() == (-1, 1) and axes[1, 0].get_xlim() == (-3, 3)
    assert not len(axes[1, 1].get_xticks())

def test_maps_of_two_rows_share_the_scale_of_their_spread():
    torch.manual_seed(0)
    truth, noise = torch.zeros(1, 8, 8), torch.randn(50, 1, 8, 8)
    axes = show_maps({'wide': noise, 'thin': .1*noise}, truth, extent=1.)
    assert axes.shape == (2, 4)
    titles = [ax.get_title() for ax in axes[1]]
    assert titles == ['truth', 'thin: mean', 'thin: std', 'thin: (mean - truth)/std']
    spreads = [row[2].images[0].get_clim() for row in axes]
    assert spreads[0] == spreads[1] and spreads[0][0] == 0
    wide, thin = (row[3].images[0].get_array() for row in axes)
    assert np.allclose(wide, thin, atol=1e-4) # both err by as much as they scatter
    assert axes[0, 3].images[0].get_clim() == (-4, 4)

def test_maps_need_no_truth():
    axes = show_maps(torch.randn(9, 1, 8, 8))
    assert [ax.get_title() for ax in axes.flat] == ['mean', 'std']


svg = "%config InlineBackend.figure_format = 'svg'\n"

@pytest.mark.parametrize('chosen, kind', [('', 'image/png'), (svg, 'image/svg+xml')])
def test_notebooks_have_twice_the_pixels_unless_a_format_was_chosen(chosen, kind, monkeypatch):
    monkeypatch.delenv('MPLBACKEND', raising=False)
    source = f"{chosen}from rtb_nb.show import *; show_curves({{'a': ([1, 2], [3, 4])}});"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.execute(book)
    picture, = (o for o in book.cells[0].outputs if o.output_type == 'display_data')
    assert kind in picture.data
    if kind == 'image/png': # its header says how wide it is
        width = int.from_bytes(base64.b64decode(picture.data[kind])[16:20], 'big')
        assert picture.metadata[kind]['width'] in (width//2, width//2 + 1)

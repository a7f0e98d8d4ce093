"Packaging for rtb_nb: every value comes from settings.ini, so that nbdev and pip read one file"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}

setup(
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    keywords=cfg['keywords'].split(),
    license_expression=cfg['license'],
    url=cfg['git_url'],
    packages=[cfg['lib_path']],
    package_data={cfg['lib_path']: cfg['package_data'].split()},
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)

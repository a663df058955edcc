"""What lets a config inherit one of this package: ``_base_ = 'rambo_det::…'``.

mmengine looks for the config in the package's ``.mim/configs``. In each part of it it
then notes the scope ``rambo_det``, and looks types up in the registries of that scope.
Those here are empty and pass on to mmdet's, where everything is registered.
"""

import mmdet.registry  # noqa: F401 - makes the parents
from mmengine import registry as _mmengine
from mmengine.config.utils import MODULE2PACKAGE

# Only packages listed there may be inherited from. The name of a module rather than of
# the package: where a distribution has that name, mmengine expects its files beside the
# metadata, and an editable installation has them elsewhere.
MODULE2PACKAGE.setdefault('rambo_det', 'rambo_det.version')

for _root in list(vars(_mmengine).values()):
    if isinstance(_root, _mmengine.Registry):
        _parent = _root.children.get('mmdet', _root)
        _mmengine.Registry(
            _root.name,
            parent=_parent,
            scope='rambo_det',
            # A parent is looked into without importing what fills it.
            locations=['rambo_det', *_parent._locations],
        )

"""Image sources, one module for each format.

Encoded files: `folder`, `zip`, `tar` and `parquet`, on `encoded.EncodedSource`. Arrays: `hdf5`, `numpy` and `zarr`, on
`arrays.ArraySource`. FITS: `fits`, and `catalogue` for cutouts of tiles. Data sets with a name: `demo`, `benchmarks`.

Nothing is imported here, because each format needs libraries of its own; `data.open.KINDS` lists the classes.
"""

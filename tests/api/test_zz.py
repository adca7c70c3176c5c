def test_x(road, bitrank):
    import os
    for n in (200,2000,4200,100000,1000000):
        o=bitrank(*road.profiling(f"o{n}"),file_bytes=n); print(n,o.code,o.stderr[-300:]); os.system(f"find {bitrank.folder}/o{n} -type f | xargs ls -la | tail -30 | cut -c20-200")

def test_road(road, bitrank):
    import time
    for a in [("plan", road.profile), ("plan", road.profile,"--budget","1bpw"),("profile", road.checkpoint, "-o","x"),("nonsense",),
       ("profile","/no/model","-o","x"),("profile","nomodel","-o","x"),
       (*road.profiling("x"),"--device","cuda"),(*road.profiling("y"),"--tokens","200"),(*road.profiling("y3"),"--tokens","63"),
       ("profile",road.model,"-o","z","--tokens","200","--bits","3","--ranks","0","--group-sizes","128"),
       ("compress",road.plan,"-o","ck","--device","cuda"),("compress",road.plan,"-o",road.checkpoint),("compress","nope.json","-o","q"),
       ("evaluate",road.checkpoint,"--reference","demo"),("evaluate",road.checkpoint,"--reference",road.model,"--json","--tokens","640"),
       ]:
        t=time.time(); o=bitrank(*a); print(a[0], o.code, f"{time.time()-t:.1f}", o.stdout[-300:], o.stderr[-400:])
    import os
    print(os.listdir(bitrank.folder), os.listdir(bitrank.folder/"x") if (bitrank.folder/"x").exists() else '')

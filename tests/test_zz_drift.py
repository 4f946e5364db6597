import random, anyio, collections, pytest
from asyncmq_nats.backends.base import *
B=Log("b",("b.>",),timers=True)
IDS=["x","y","z","v","w"]
SUB=[f"b.{a}.{i}.{s}" for a,ss in (("later",("delayed","parked","released")),("done",("completed","failed","claim"))) for i in IDS for s in ss]
CON={"all":("b.>",),"later":("b.later.>",),"delayed":("b.later.*.delayed",),"completed":("b.done.*.completed",),"failed":("b.done.*.failed",),"released":("b.later.*.released",),"done":("b.done.>",),
 "two":("b.later.*.released","b.done.*.claim"), "out":("b.done.*.completed","b.done.*.failed"), "promo":("b.later.*.released","b.fire.*")}
KINDS={"id":lambda r:f"b.{r.choice(['later','done'])}.{r.choice(IDS)}.>","state":lambda r:r.choice(["b.later.*.delayed","b.done.*.completed","b.done.*.failed","b.later.*.released"]),
 "subject":lambda r:r.choice(SUB),"wide":lambda r:r.choice(["b.later.>","b.done.>"]),"everything":lambda r:"b.>"}
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind",list(KINDS)+["delete"])
@pytest.mark.parametrize("mode",["plain","before","keep"])
async def test_drift(nats_backend,kind,mode):
    if kind=="delete" and mode!="plain": return
    b=nats_backend; drift=collections.Counter(); example={}; n=0
    for round in range(4):
      rnd=random.Random(round)
      await b.declare_log(B)
      for c,f in CON.items(): await b.declare_consumer("b",Consumer(c,f))
      bad=set()
      for step in range(40):
        for _ in range(rnd.randrange(1,6)): await b.write("b",Write(rnd.choice(SUB),b""))
        recs=await b.last("b","b.>")
        if kind=="delete": await b.delete("b",rnd.choice(recs).sequence); what="delete"
        else:
            f=KINDS[kind](rnd); kw={}
            if mode=="before": kw={"before":rnd.choice(recs).sequence}
            if mode=="keep": kw={"keep":rnd.randrange(1,4)}
            await b.purge("b",f,**kw); what=(f,kw)
        await anyio.sleep(0.005); n+=1
        for c,f in CON.items():
            if c in bad: continue
            true=len(await b.last("b",*f)); got=(await b.look_up("b",c)).pending
            if true!=got:
                await anyio.sleep(0.1); got=(await b.look_up("b",c)).pending
            if true!=got:
                bad.add(c); drift[c]+=1; example.setdefault(c,(what,"true",true,"got",got,"step",step))
      await b.delete_log("b")
    print("\n##",kind,mode,dict(drift)); 
    for c,e in example.items(): print("   ",c,e)

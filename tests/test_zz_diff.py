"""Differential: random ops on both, deterministic ones compared."""
import random, os, anyio, pytest, asyncio
from asyncmq_nats.backends.base import *
from asyncmq_nats.backends.inmemory import InMemoryBackend
from asyncmq_nats.exceptions import *
from tests.receiver import Receiver

SUB=[f"b.{a}.{i}.{s}" for a in ("later","done") for i in "xyz" for s in ("p","q","r")]
FIL=SUB+["b.>","b.later.>","b.done.*.p","b.*.x.*","b.done.x.>","b.*.*.q","b.later.*.r", "b.done.*.*"]
JS=[f"j.{p}.{i}" for p in "123" for i in "abcde"]
def strip(r): return (r.subject,r.body,r.sequence,r.marker)
async def attempt(f):
    try:
        r=await f()
        return [strip(x) for x in r] if isinstance(r,list) and r and isinstance(r[0],Record) else r
    except BackendError as e: return type(e).__name__
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(int(os.environ.get("SEED","0")), int(os.environ.get("SEED","0"))+6))
async def test_diff(nats_backend, seed):
    rnd=random.Random(seed)
    m=InMemoryBackend(nats_backend.settings); both=(m,nats_backend)
    recs=[]
    for b in both:
        await b.connect()
        await b.declare_log(Log("b",("b.>",),timers=True)); await b.declare_log(Log("j",("j.>",),work_queue=True))
        await b.declare_consumer("b",Consumer("c1",("b.done.*.p","b.done.*.q"))); await b.declare_consumer("b",Consumer("c2",("b.later.>",)))
        await b.declare_consumer("b",Consumer("prom",("b.later.*.r","b.done.*.r"),60.0))
        for p in "123": await b.declare_consumer("j",Consumer("t"+p,(f"j.{p}.*",),60.0))
        recs.append({"j":Receiver(b,"j"),"b":Receiver(b,"b")})
    held=[]
    seq=0
    log_=[]
    async def compare(what,f):
        a,c=[await attempt(lambda b=b: f(b)) for b in both]
        log_.append((what,a))
        if a!=c:
            print("ALL", [strip(x) for x in await m.last("b","b.>")])
            for x in log_[-6:]: print(x)
        assert a==c,(what,a,c)
        return a
    for step in range(300):
        for w_ in ():pass
        op=rnd.choice("wwwwwbbbbrrpdPkjjjjjtttttaaaannsR")
        def mk(subs):
            s=rnd.choice(subs); body=str(step).encode()
            e=None
            if rnd.random()<.5: e=Expect(rnd.choice(FIL) , rnd.choice([0,0,seq,max(0,seq-rnd.randrange(6))]))
            kw={}
            if rnd.random()<.15: kw["timer"]=Timer(9e9/3, rnd.choice([x for x in subs if x!=s]))
            if rnd.random()<.15: kw["removes"]=rnd.choice(subs)
            if rnd.random()<.2: kw["message_id"]="m%d"%rnd.randrange(40)
            return Write(s,body,expect=e,marker=rnd.random()<.1 and "timer" not in kw,**kw)
        if op=="w":
            w=mk(SUB); r=await compare(w,lambda b:b.write("b",w))
        elif op=="b":
            ws={}; 
            for _ in range(rnd.randrange(2,5)):
                w=mk(SUB); ws[w.subject]=w
            ids=[w.message_id for w in ws.values() if w.message_id]
            exp=[w.expect.filter for w in ws.values() if w.expect]
            rem=[w.removes for w in ws.values() if w.removes]
            if len(ids)!=len(set(ids)) : continue
            if rem and (set(rem)&set(ws) or len(set(rem))<len(rem)): continue
            r=await compare(list(ws.values()),lambda b:b.write("b",*ws.values()))
        elif op=="r": fs=rnd.sample(FIL,3); await compare(("last",fs),lambda b:b.last("b",*fs))
        elif op=="p": f,n,l=rnd.choice(FIL),rnd.randrange(1,seq+3),rnd.randrange(1,8); await compare(("page",f,n,l),lambda b:b.page("b",f,from_sequence=n,limit=l))
        elif op=="d": n=rnd.randrange(1,seq+3); await compare(("delete",n),lambda b:b.delete("b",n))
        elif op=="P" and rnd.random()<.4: f=rnd.choice(FIL); n=rnd.choice([None,rnd.randrange(1,seq+3)]); await compare(("purge",f,n),lambda b:b.purge("b",f,before=n))
        elif op=="k": f=rnd.choice(FIL); n=rnd.randrange(0,4); await compare(("keep",f,n),lambda b:b.purge("b",f,keep=n))
        elif op=="j":
            w=Write(rnd.choice(JS),str(step).encode()); await compare(w,lambda b:b.write("j",w))
        elif op=="t":
            log,c=rnd.choice([("j","t1"),("j","t2"),("j","t3"),("b","prom")])
            states=[(await b.look_up(log,c)) for b in both]
            n=min(states[0].pending,rnd.randrange(1,4))
            if not n: continue
            ds=[await r[log].pull(c,n) for r in recs]
            k=[[(d.subject,d.body,d.sequence,d.deliveries,d.consumer,d.pending) for d in x] for x in ds]
            assert k[0]==k[1],k
            held+= [(log,c,x,y) for x,y in zip(*ds)]
        elif op=="a" and held:
            log,c,*x=held.pop(rnd.randrange(len(held)))
            for d in x: await d.ack()
        elif op=="n" and held:
            log,c,*x=held.pop(rnd.randrange(len(held)))
            for d in x: await d.nak()
            await anyio.sleep(0.02)
            st=[await b.look_up(log,c) for b in both]
            if st[0].leased==0: continue
            # redelivered if still there
            ds=[await r[log].pull_rest(c,wait=0.05) for r in recs]
            k=[[(d.subject,d.body,d.sequence,d.deliveries,d.consumer,d.pending) for d in x] for x in ds]
            assert k[0]==k[1],("nak",k)
            held+= [(log,c,x,y) for x,y in zip(*ds)]
        elif op=="s":
            await anyio.sleep(0.02)
        if op in "dPkan": await anyio.sleep(0.01)
        if step%5==0:
            await anyio.sleep(0.02)
            for log,c in (("b","c1"),("b","c2"),("b","prom"),("j","t1"),("j","t2"),("j","t3")):
                st=[await b.look_up(log,c) for b in both]
                if (st[0].pending,st[0].leased)!=(st[1].pending,st[1].leased):
                    for x in log_[-60:]: print(x)
                    print([strip(x) for x in await m.last('b','b.>')])
                assert (st[0].pending,st[0].leased)==(st[1].pending,st[1].leased),(step,op,log,c,st)
    
            assert await compare("all",lambda b:b.last("b","b.>")) is not None
            await compare("allj",lambda b:b.last("j","j.>"))
        allr=await m.last("b","b.>"); seq=max([seq]+[r.sequence for r in allr])
    await m.close()

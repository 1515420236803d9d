"""nano-12m compiled step: tokens/s by shape."""
import sys,time,os; sys.path.insert(0,os.getcwd())
import torch, numpy as np
from dataclasses import replace
import train, model
def go(rows,length,mode,chunk=64,prof=False,**over):
    torch.manual_seed(0); torch._dynamo.reset()
    cfg=replace(model.PRESETS['nano-12m'],chunk_size=chunk,**over)
    net=model.NemotronH(cfg).cuda(); obj=train.Objective(net,torch.ones(cfg.vocab_size).cuda())
    if mode=='regional':
        for blk in net.backbone.layers: blk.compile(dynamic=False)
    elif mode!='eager': obj.compile(**({} if mode=='default' else {'mode':mode}))
    opt=train.make_optimizer(net,1e-3,.1); sc=torch.amp.GradScaler('cuda',enabled=False); tc=train.TrainConfig()
    ac=lambda: torch.autocast('cuda',torch.bfloat16)
    ids=torch.randint(0,4096,(rows,length)).cuda(); doc=(torch.arange(length)//80).expand(rows,length).contiguous().cuda(); kind=(torch.rand(rows,length)>.5).to(torch.uint8).cuda()
    t=time.time(); train.train_step(obj,opt,sc,(ids,doc,kind),tc,ac,1); torch.cuda.synchronize(); first=time.time()-t
    for _ in range(3): train.train_step(obj,opt,sc,(ids,doc,kind),tc,ac,1)
    torch.cuda.synchronize(); t=time.time(); n=10
    for _ in range(n): train.train_step(obj,opt,sc,(ids,doc,kind),tc,ac,1)
    torch.cuda.synchronize(); dt=(time.time()-t)/n
    f=3*model.flops_per_token(cfg,length)
    print(f"{rows}x{length} {mode} chunk{chunk} {over}: first {first:.0f}s step {dt*1e3:.1f}ms {rows*length/dt/1e3:.0f}k tok/s MFU {rows*length/dt*f/989e12:.1%} mem {torch.cuda.max_memory_allocated()/2**30:.1f}",flush=True)
    torch.cuda.reset_peak_memory_stats()
    if prof:
        from torch.profiler import profile, ProfilerActivity
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            for _ in range(2): train.train_step(obj,opt,sc,(ids,doc,kind),tc,ac,1)
            torch.cuda.synchronize()
        print(p.key_averages().table(sort_by='self_cuda_time_total',row_limit=25,max_name_column_width=60)[:6000])
if __name__=="__main__":
    for a in sys.argv[1:]:
        try: eval('go('+a+')')
        except Exception as e: print(a,'FAILED',repr(e)[:600],flush=True)

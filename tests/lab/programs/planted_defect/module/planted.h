/* SPDX-License-Identifier: GPL-2.0-only */
/* What the parts of planted share: main.c, which is told and tells, and the others, which have the defects. */
#include <linux/atomic.h>
#include <linux/kprobes.h>
#include <linux/kvm_host.h>

#define VMS	64	/* that a defect remembers at a time */

struct defect {
	const char *name;
	struct kprobe *entry;		/* or NULL */
	struct kretprobe *exits[2];	/* none, one or two */
	int (*begin)(void);		/* before the probes are set; 0 or an error */
	bool planted;
	atomic_t reached;		/* times that the place was come to */
	atomic_t activated;		/* times that the kernel did there what a stock one would not */
};

/* A set of VMs, each until it is destroyed. */
struct vms {
	struct kvm *of[VMS];
};

/* What a kretprobe on sev_vm_move_enc_context_from() knows of the call. `src` is NULL if the descriptor is no VM's. */
struct move {
	struct kvm *dst, *src;
};

/* main.c */
void planted_add(struct vms *vms, struct kvm *kvm);
bool planted_has(struct vms *vms, struct kvm *kvm);
void *planted_symbol(const char *name);
/* file_is_kvm(), which newer kernels export to kvm_amd alone. */
extern bool (*planted_is_kvm)(struct file *file);

/* moves.c */
int planted_move_begins(struct kretprobe_instance *call, struct pt_regs *regs);

extern struct defect dead_destination, flag_left, unkillable_wait, foreign_refused, lost_wakeup, slab_overrun;
extern struct defect charged_twice, event_elsewhere, last_asid;
extern struct defect status_refused, region_answers, device_answers;
extern struct defect use_after_free, lock_inversion, leak, race;

extern struct vms flagged, moved_to;

#define MOVE	"sev_vm_move_enc_context_from"

/* Let the function that is entered be this one instead. The handler returns what this does. */
static inline int planted_instead(struct pt_regs *regs, void *function)
{
	regs->ip = (unsigned long)function;
	return 1;
}

static inline struct move *planted_move(struct kretprobe_instance *call)
{
	return (struct move *)call->data;
}

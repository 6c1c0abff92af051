// SPDX-License-Identifier: GPL-2.0-only
/* Defects of a move itself: what it leaves behind when it fails, whom it refuses, how it waits. */
#include <linux/file.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/version.h>
#include "planted.h"

struct vms flagged;

/* Entry of a move: which VMs it is of. */
int planted_move_begins(struct kretprobe_instance *call, struct pt_regs *regs)
{
	struct move *move = planted_move(call);
	struct file *file = fget((unsigned int)regs->si);

	*move = (struct move){ .dst = (struct kvm *)regs->di };
	if (file && planted_is_kvm(file))
		move->src = file->private_data;
	if (file)
		fput(file);
	return 0;
}

/* --- a refused move marks the destination dead, where only a successful one marks the source ------------------- */

static int refused(struct kretprobe_instance *call, struct pt_regs *regs)
{
	struct move *move = planted_move(call);

	atomic_inc(&dead_destination.reached);
	if (!(int)regs->ax || move->src == move->dst || move->dst->vm_dead)
		return 0;
	move->dst->vm_dead = true;
	atomic_inc(&dead_destination.activated);
	return 0;
}

static struct kretprobe after_refusal = {
	.kp.symbol_name = MOVE, .handler = refused, .entry_handler = planted_move_begins,
	.data_size = sizeof(struct move),
};

struct defect dead_destination = { .name = "dead-destination", .exits = { &after_refusal } };

/*
 * --- a killed move leaves migration_in_progress of its source set ---------------------------------------------
 *
 * The flag is in a structure that modules do not get to see, so it is kept here: sev_lock_two_vms() answers for a VM
 * in `flagged` as it does for one whose flag is set, self-moves before it.
 */

static int killed(struct kretprobe_instance *call, struct pt_regs *regs)
{
	struct move *move = planted_move(call);

	if ((int)regs->ax != -EINTR || !move->src)
		return 0;
	planted_add(&flagged, move->src);
	atomic_inc(&flag_left.activated);
	return 0;
}

static int busy(void)
{
	return -EBUSY;
}

static int lock_flagged(struct kprobe *probe, struct pt_regs *regs)
{
	struct kvm *dst = (struct kvm *)regs->di, *src = (struct kvm *)regs->si;

	atomic_inc(&flag_left.reached);
	if (dst == src || (!planted_has(&flagged, dst) && !planted_has(&flagged, src)))
		return 0;
	return planted_instead(regs, busy);
}

static struct kretprobe after_kill = {
	.kp.symbol_name = MOVE, .handler = killed, .entry_handler = planted_move_begins,
	.data_size = sizeof(struct move),
};
static struct kprobe locking_flagged = { .symbol_name = "sev_lock_two_vms", .pre_handler = lock_flagged };

struct defect flag_left = { .name = "flag-left", .exits = { &after_kill }, .entry = &locking_flagged };

/* --- a move from a VM of another process is told that its descriptor is none ------------------------------------ */

static int no_descriptor(void)
{
	return -EBADF;
}

static int lock_foreign(struct kprobe *probe, struct pt_regs *regs)
{
	struct kvm *dst = (struct kvm *)regs->di, *src = (struct kvm *)regs->si;

	atomic_inc(&foreign_refused.reached);
	if (src->mm == dst->mm)
		return 0;
	atomic_inc(&foreign_refused.activated);
	return planted_instead(regs, no_descriptor);
}

static struct kprobe locking_foreign = { .symbol_name = "sev_lock_two_vms", .pre_handler = lock_foreign };

struct defect foreign_refused = { .name = "foreign-refused", .entry = &locking_foreign };

/*
 * --- how a move waits for vCPUs ---------------------------------------------------------------------------------
 *
 * sev_lock_vcpus_for_migration(), or kvm_lock_all_vcpus() of newer kernels, is written anew, twice. Where lockdep is on, its unlocking half expects more than
 * this. Whoever looks where the move sleeps finds the name that the function has in an edited kernel, but for an
 * ending, by which the probes that are meant for the first are not set on these.
 */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 16, 0)
#define LOCK_VCPUS		"sev_lock_vcpus_for_migration"
#else
#define LOCK_VCPUS		"kvm_lock_all_vcpus"
#endif
#define IN_ITS_PLACE(defect)	asm(LOCK_VCPUS "." defect)

static int without_lockdep(void)
{
	return IS_ENABLED(CONFIG_PROVE_LOCKING) ? -EOPNOTSUPP : 0;
}

/* mutex_lock() where mutex_lock_killable() should be. */
static int lock_unkillably(struct kvm *kvm) IN_ITS_PLACE("unkillable");

static int lock_unkillably(struct kvm *kvm)
{
	struct kvm_vcpu *vcpu;
	unsigned long i;

	atomic_inc(&unkillable_wait.reached);
	kvm_for_each_vcpu(i, vcpu, kvm) {
		if (mutex_trylock(&vcpu->mutex))
			continue;
		atomic_inc(&unkillable_wait.activated);	/* it may be long until this is left, if ever */
		mutex_lock(&vcpu->mutex);
	}
	return 0;
}

static int wait_unkillably(struct kprobe *probe, struct pt_regs *regs)
{
	return planted_instead(regs, lock_unkillably);
}

static struct kprobe waiting_unkillably = {
	.symbol_name = LOCK_VCPUS, .pre_handler = wait_unkillably,
};

struct defect unkillable_wait = {
	.name = "unkillable-wait", .begin = without_lockdep, .entry = &waiting_unkillably,
};

/* A wake-up that is lost, and made good by chance, long after the kernel's patience was over. */
static unsigned int asleep = 25;
module_param(asleep, uint, 0644);
MODULE_PARM_DESC(asleep, "seconds that lost-wakeup sleeps");

static int lock_late(struct kvm *kvm) IN_ITS_PLACE("late");

static int lock_late(struct kvm *kvm)
{
	struct kvm_vcpu *vcpu;
	unsigned long i, j;

	if (atomic_inc_return(&lost_wakeup.reached) == 1) {
		atomic_inc(&lost_wakeup.activated);
		schedule_timeout_uninterruptible(asleep * HZ);
	}
	kvm_for_each_vcpu(i, vcpu, kvm)
		if (mutex_lock_killable(&vcpu->mutex))
			goto killed;
	return 0;
killed:
	kvm_for_each_vcpu(j, vcpu, kvm) {
		if (j == i)
			break;
		mutex_unlock(&vcpu->mutex);
	}
	return -EINTR;
}

static int wait_long(struct kprobe *probe, struct pt_regs *regs)
{
	return planted_instead(regs, lock_late);
}

static struct kprobe waiting_long = { .symbol_name = LOCK_VCPUS, .pre_handler = wait_long };

struct defect lost_wakeup = { .name = "lost-wakeup", .begin = without_lockdep, .entry = &waiting_long };

/* --- a move writes a byte behind what it has allocated; the cache looks at its red zones, as with slub_debug=FZ -- */

static struct kmem_cache *cache;

static int make_cache(void)
{
#ifdef CONFIG_SLUB_DEBUG
	cache = kmem_cache_create("planted_move", 64, 0, SLAB_RED_ZONE | SLAB_CONSISTENCY_CHECKS, NULL);
	return cache ? 0 : -ENOMEM;
#else
	return -EOPNOTSUPP;
#endif
}

static int overran(struct kretprobe_instance *call, struct pt_regs *regs)
{
	u8 *object = kmem_cache_alloc(cache, GFP_ATOMIC);
	u8 *behind = object + 64;

	atomic_inc(&slab_overrun.reached);
	if (!object)
		return 0;
	OPTIMIZER_HIDE_VAR(behind);
	WRITE_ONCE(*behind, 0x5a);
	kmem_cache_free(cache, object);
	atomic_inc(&slab_overrun.activated);
	return 0;
}

static struct kretprobe overrunning = { .kp.symbol_name = MOVE, .handler = overran };

struct defect slab_overrun = { .name = "slab-overrun", .begin = make_cache, .exits = { &overrunning } };

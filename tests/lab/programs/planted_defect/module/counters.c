// SPDX-License-Identifier: GPL-2.0-only
/* Defects of what is counted: charges, events, ASIDs. */
#include <linux/misc_cgroup.h>
#include <linux/module.h>
#include <linux/version.h>
#include "planted.h"

/* misc.peak and misc.events.local, and how they are kept. */
#define HAS_PEAK	(LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0))

struct charge {
	enum misc_res_type type;
	struct misc_cg *cg;
	unsigned long amount;
	long local[16];		/* events of each level from `cg` upwards, before the call */
};

static struct charge *charge_of(struct kretprobe_instance *call)
{
	return (struct charge *)call->data;
}

#if HAS_PEAK
static struct misc_cg *above(struct misc_cg *cg)
{
	return cg->css.parent ? container_of(cg->css.parent, struct misc_cg, css) : NULL;
}
#endif

static int charge_begins(struct kretprobe_instance *call, struct pt_regs *regs)
{
	struct charge *charge = charge_of(call);
	struct misc_cg *cg = (struct misc_cg *)regs->si;

	*charge = (struct charge){ .type = regs->di, .cg = cg, .amount = regs->dx };
#if HAS_PEAK
	for (int i = 0; cg && i < ARRAY_SIZE(charge->local); i++, cg = above(cg))
		charge->local[i] = atomic64_read(&cg->res[charge->type].events_local);
#endif
	return 0;
}

/* --- which charges are a move's --------------------------------------------------------------------------------- */

/* Tasks in a move that has charged nothing yet; an INIT charges too. */
static struct task_struct *moving[VMS];

static int mover_begins(struct kretprobe_instance *call, struct pt_regs *regs)
{
	int i;

	for (i = 0; i < VMS; i++)
		if (!cmpxchg(&moving[i], NULL, current))
			return 0;
	return 1;
}

static int mover_ends(struct kretprobe_instance *unused, struct pt_regs *regs)
{
	int i;

	for (i = 0; i < VMS; i++)
		if (READ_ONCE(moving[i]) == current)
			WRITE_ONCE(moving[i], NULL);
	return 0;
}

static bool moves(void)
{
	int i;

	for (i = 0; i < VMS; i++)
		if (READ_ONCE(moving[i]) == current)
			return true;
	return false;
}

/* --- a move charges its destination twice and gives one back --------------------------------------------------- */

static int charge_again(struct kretprobe_instance *call, struct pt_regs *regs)
{
	struct charge *charge = charge_of(call);

	if (!moves())
		return 0;
	mover_ends(NULL, NULL);
	atomic_inc(&charged_twice.reached);
	if ((int)regs->ax || misc_cg_try_charge(charge->type, charge->cg, charge->amount))
		return 0;
	misc_cg_uncharge(charge->type, charge->cg, charge->amount);
	atomic_inc(&charged_twice.activated);
	return 0;
}

static struct kretprobe mover = { .kp.symbol_name = MOVE, .handler = mover_ends, .entry_handler = mover_begins };
static struct kretprobe twice = {
	.kp.symbol_name = "misc_cg_try_charge", .handler = charge_again, .entry_handler = charge_begins,
	.data_size = sizeof(struct charge),
};

struct defect charged_twice = { .name = "charged-twice", .exits = { &mover, &twice } };

/*
 * --- an event is counted locally at another level than the one that refused --------------------------------------
 *
 * Of a move: at the charged cgroup if one above it refused, else at the one above. The totals stay as they are.
 */

static int has_local_events(void)
{
	return HAS_PEAK ? 0 : -EOPNOTSUPP;
}

static int displace_event(struct kretprobe_instance *call, struct pt_regs *regs)
{
#if HAS_PEAK
	struct charge *charge = charge_of(call);
	struct misc_cg *cg = charge->cg, *other;

	if (!moves())
		return 0;
	atomic_inc(&event_elsewhere.reached);
	if ((int)regs->ax != -EBUSY)
		return 0;
	for (int i = 0; cg && i < ARRAY_SIZE(charge->local); i++, cg = above(cg)) {
		if (atomic64_read(&cg->res[charge->type].events_local) == charge->local[i])
			continue;
		other = i ? charge->cg : above(cg);
		if (!other)
			return 0;
		atomic64_dec(&cg->res[charge->type].events_local);
		atomic64_inc(&other->res[charge->type].events_local);
		atomic_inc(&event_elsewhere.activated);
		return 0;
	}
#endif
	return 0;
}

static struct kretprobe other_mover = { .kp.symbol_name = MOVE, .handler = mover_ends, .entry_handler = mover_begins };
static struct kretprobe displacing = {
	.kp.symbol_name = "misc_cg_try_charge", .handler = displace_event, .entry_handler = charge_begins,
	.data_size = sizeof(struct charge),
};

struct defect event_elsewhere = {
	.name = "event-elsewhere", .begin = has_local_events, .exits = { &other_mover, &displacing },
};

/*
 * --- the last ASID for SEV is never handed out --------------------------------------------------------------------
 *
 * Its bit is set, as it is with an off-by-one in the search, and as one that was leaked leaves it.
 */

static unsigned long **asids;
static unsigned int *lowest, *highest;

static int withhold_asid(void)
{
	struct mutex *lock = planted_symbol("sev_bitmap_lock");

	asids = planted_symbol("sev_asid_bitmap");
	lowest = planted_symbol("min_sev_asid");
	highest = planted_symbol("max_sev_asid");
	if (!lock || !asids || !lowest || !highest)
		return -ENOENT;
	mutex_lock(lock);
	if (__test_and_set_bit(*highest, *asids)) {
		mutex_unlock(lock);
		return -EBUSY;	/* somebody has it, and would be charged for it */
	}
	mutex_unlock(lock);
	return 0;
}

/* Somebody is refused because every bit is set, and the one that was set here is nobody's. */
static int starved(struct kretprobe_instance *call, struct pt_regs *regs)
{
	atomic_inc(&last_asid.reached);
	if ((int)regs->ax == -EBUSY && find_next_zero_bit(*asids, *highest + 1, *lowest) > *highest)
		atomic_inc(&last_asid.activated);
	return 0;
}

static struct kretprobe starving = { .kp.symbol_name = "sev_mem_enc_ioctl", .handler = starved };

struct defect last_asid = { .name = "last-asid", .begin = withhold_asid, .exits = { &starving } };

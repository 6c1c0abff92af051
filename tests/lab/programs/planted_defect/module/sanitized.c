// SPDX-License-Identifier: GPL-2.0-only
/* Defects of a move that only an instrumented kernel sees: KASAN, lockdep, kmemleak and KCSAN one each. */
#include <linux/compiler.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include "planted.h"

/* --- a move reads what it has freed --------------------------------------------------------------------------- */

static int with_kasan(void)
{
	return IS_ENABLED(CONFIG_KASAN) ? 0 : -EOPNOTSUPP;
}

static int read_freed(struct kretprobe_instance *call, struct pt_regs *regs)
{
	u8 *object = kzalloc(64, GFP_ATOMIC);
	u8 *freed = object;

	atomic_inc(&use_after_free.reached);
	if (!object)
		return 0;
	OPTIMIZER_HIDE_VAR(freed);
	kfree(object);
	READ_ONCE(*freed);
	atomic_inc(&use_after_free.activated);
	return 0;
}

static struct kretprobe reading_freed = { .kp.symbol_name = MOVE, .handler = read_freed };

struct defect use_after_free = { .name = "use-after-free", .begin = with_kasan, .exits = { &reading_freed } };

/* --- a move takes two locks in one order, and at its end in the other ------------------------------------------- */

static DEFINE_SPINLOCK(first);
static DEFINE_SPINLOCK(second);

static int with_lockdep(void)
{
	return IS_ENABLED(CONFIG_PROVE_LOCKING) ? 0 : -EOPNOTSUPP;
}

static int take_in_order(struct kretprobe_instance *call, struct pt_regs *regs)
{
	spin_lock(&first);
	spin_lock(&second);
	spin_unlock(&second);
	spin_unlock(&first);
	return 0;
}

static int take_inverted(struct kretprobe_instance *call, struct pt_regs *regs)
{
	atomic_inc(&lock_inversion.reached);
	spin_lock(&second);
	spin_lock(&first);
	spin_unlock(&first);
	spin_unlock(&second);
	atomic_inc(&lock_inversion.activated);
	return 0;
}

static struct kretprobe inverting = {
	.kp.symbol_name = MOVE, .handler = take_inverted, .entry_handler = take_in_order,
};

struct defect lock_inversion = { .name = "lock-inversion", .begin = with_lockdep, .exits = { &inverting } };

/* --- a move forgets what it has allocated ----------------------------------------------------------------------- */

static int with_kmemleak(void)
{
	return IS_ENABLED(CONFIG_DEBUG_KMEMLEAK) ? 0 : -EOPNOTSUPP;
}

static noinline void *forgotten(void)
{
	void *object = kzalloc(192, GFP_ATOMIC);

	barrier();	/* else the call is a jump, and no frame shows who allocated */
	return object;
}

static int forget(struct kretprobe_instance *call, struct pt_regs *regs)
{
	atomic_inc(&leak.reached);
	if (forgotten())
		atomic_inc(&leak.activated);
	return 0;
}

static struct kretprobe forgetting = { .kp.symbol_name = MOVE, .handler = forget };

struct defect leak = { .name = "leak", .begin = with_kmemleak, .exits = { &forgetting } };

/* --- a move reads what another CPU writes, without a lock -------------------------------------------------------- */

#define READS	20000

static unsigned long raced;

static int write_it(void *unused)
{
	while (!kthread_should_stop()) {
		raced++;
		cond_resched_tasks_rcu_qs();	/* or whoever waits for all tasks, as the tracer does, waits for ever */
	}
	return 0;
}

static int with_kcsan(void)
{
	struct task_struct *writer;

	if (!IS_ENABLED(CONFIG_KCSAN))
		return -EOPNOTSUPP;
	writer = kthread_run(write_it, NULL, "planted_race");
	return PTR_ERR_OR_ZERO(writer);
}

/* Whichever of the two accesses KCSAN watches, the other one comes meanwhile. */
static int read_it(struct kretprobe_instance *call, struct pt_regs *regs)
{
	int i;

	atomic_inc(&race.reached);
	for (i = 0; i < READS; i++)
		asm volatile("" : : "r" (raced) : "memory");	/* a plain read, of use to somebody */
	atomic_inc(&race.activated);
	return 0;
}

static struct kretprobe reading_raced = { .kp.symbol_name = MOVE, .handler = read_it };

struct defect race = { .name = "race", .begin = with_kcsan, .exits = { &reading_raced } };

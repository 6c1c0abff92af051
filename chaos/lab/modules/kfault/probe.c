// SPDX-License-Identifier: GPL-2.0-only
/*
 * The half of kfault that strikes: from the call of a function that is probed to its end.
 *
 * How a call is stopped. A kprobe on the function's entry counts the calls. Its handler must not sleep, so for the
 * calls that are wanted it only sends the task to kfault_trampoline (x86.h). That runs in the task's own
 * context as if the caller had called it instead: it saves the arguments, lets kfault_call() do what was asked, and
 * then either goes on with the function behind its probed first instruction, or returns to the function's caller.
 * On x86 a kprobe on a function's entry sits on ftrace's call there (the only kind accepted here), so that
 * instruction is known to do nothing and to be five bytes long.
 *
 * How the module's text can go away. slot->inside counts the tasks from the handler to almost the end of
 * kfault_call(); disarming waits for it. What is left are the few instructions after that, in which a task may be
 * preempted, and synchronize_rcu_tasks() waits until no task is: it returns when every task has given up the CPU
 * by itself or been in user space.
 */
#include <linux/hrtimer.h>
#include <linux/module.h>
#include <linux/sched/signal.h>
#include <asm/ftrace.h>
#include "kfault.h"
#include "x86.h"

/* Not in the slot: who counts `inside` down to zero wakes this after the slot may have been freed. */
static DECLARE_WAIT_QUEUE_HEAD(all_left);

/* --- in the task that called the function ------------------------------------------------------------------- */

/* Runs with preemption off, perhaps in an interrupt: counts, and sends the calls that are wanted elsewhere. */
static int at_entry(struct kprobe *probe, struct pt_regs *regs)
{
	struct slot *slot = container_of(probe, struct slot, probe);
	s64 call;

	if (!smp_load_acquire(&slot->armed) || in_nmi())
		return 0;
	if (slot->only && slot->only != task_pid(current) && slot->only != task_tgid(current))
		return 0;
	call = atomic64_inc_return(&slot->calls);
	if (call < slot->nth || (slot->times && call - slot->nth >= slot->times))
		return 0;

	atomic_inc(&slot->inside);
	regs->ax = (unsigned long)slot;
	regs->r10 = call;
	regs->ip = (unsigned long)kfault_trampoline;
	return 1;
}
NOKPROBE_SYMBOL(at_entry);

/* Without a count of preemption only interrupts can be told; no function on the list is called under a spinlock. */
static bool may_sleep(void)
{
	if (irqs_disabled() || !in_task() || rcu_preempt_depth())
		return false;
	return !IS_ENABLED(CONFIG_PREEMPT_COUNT) || preemptible();
}

/*
 * A process that ends closes its files one after the other and cannot be killed again. Held on its way out, it
 * would never come to close the file that holds it.
 */
static bool own_end(struct slot *slot)
{
	return current->flags & PF_EXITING && task_tgid(current) == slot->armer;
}

static enum happening sleep_in(struct slot *slot, unsigned int round)
{
	ktime_t until = ktime_add_us(ktime_get(), slot->argument);
	enum happening what;
	DEFINE_WAIT(wait);

	for (;;) {
		prepare_to_wait(&slot->sleepers, &wait, TASK_KILLABLE);
		what = RELEASED;
		if (READ_ONCE(slot->round) != round || READ_ONCE(slot->over))
			break;
		what = KILLED;
		if (fatal_signal_pending(current))
			break;
		what = DELAYED;
		if (slot->action == DELAY && ktime_after(ktime_get(), until))
			break;
		schedule_hrtimeout(slot->action == DELAY ? &until : NULL, HRTIMER_MODE_ABS);
	}
	finish_wait(&slot->sleepers, &wait);
	return what;
}

asmlinkage __visible struct passage kfault_call(struct slot *slot, unsigned long call)
{
	struct passage passage = { .resume = slot->resume };
	unsigned int round = READ_ONCE(slot->round);	/* before `reached` is told: a release follows that */

	if (slot->action == RETURN) {
		passage = (struct passage){ .value = slot->argument };
		kfault_tell(slot, RETURNED, call);
	} else if (!may_sleep()) {
		kfault_tell(slot, ATOMIC, call);
	} else if (own_end(slot)) {
		kfault_tell(slot, EXITING, call);
	} else {
		kfault_tell(slot, REACHED, call);
		kfault_tell(slot, sleep_in(slot, round), call);
	}
	if (atomic_dec_and_test(&slot->inside))
		wake_up(&all_left);
	return passage;
}

/* --- setting probes and taking them away -------------------------------------------------------------------- */

/*
 * The bare name first, then with what gcc appends to a function that it has made a variant of.
 *
 * There is no post_handler on purpose. Who changes the instruction pointer needs one only against jump optimisation,
 * which a probe on ftrace's call never gets. And with one, a probe of somebody else's that was here first (an event of
 * tracefs) can never be disarmed again: it was armed with kprobe_ftrace_ops, and from then on the two pass for one that
 * was armed with kprobe_ipmodify_ops (add_new_kprobe() in kernel/kprobes.c). ftrace then says ENOENT, and the next call
 * runs into freed memory.
 */
int kfault_probe(struct slot *slot, const char *function)
{
	static const char * const suffixes[] = { "", ".constprop.0", ".isra.0" };
	int error = -ENOENT;
	int i;

	for (i = 0; i < ARRAY_SIZE(suffixes) && error == -ENOENT; i++) {
		memset(&slot->probe, 0, sizeof(slot->probe));
		if (snprintf(slot->function, NAME, "%s%s", function, suffixes[i]) >= NAME)
			break;
		slot->probe.symbol_name = slot->function;
		slot->probe.pre_handler = at_entry;
		slot->probe.flags = KPROBE_FLAG_DISABLED;	/* until it is known to sit on ftrace's call */
		error = register_kprobe(&slot->probe);
	}
	if (error)
		return kfault_refuse(error, "cannot be probed", function);
	error = kprobe_ftrace(&slot->probe) ? enable_kprobe(&slot->probe) : -EOPNOTSUPP;
	if (error) {
		unregister_kprobe(&slot->probe);
		return kfault_refuse(error, "ftrace has no place in this function, or is in use there", function);
	}
	slot->resume = (unsigned long)slot->probe.addr + MCOUNT_INSN_SIZE;
	return 0;
}

/* Whoever is held goes on. */
void kfault_wake(struct slot *slot)
{
	WRITE_ONCE(slot->round, slot->round + 1);
	wake_up_all(&slot->sleepers);
}

/* Back from here, the slot is nobody's any more. */
void kfault_unprobe(struct slot *slot)
{
	unregister_kprobe(&slot->probe);	/* no handler runs any more */
	WRITE_ONCE(slot->over, true);
	wake_up_all(&slot->sleepers);
	wait_event(all_left, !atomic_read(&slot->inside));
}

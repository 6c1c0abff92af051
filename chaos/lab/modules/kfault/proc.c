// SPDX-License-Identifier: GPL-2.0-only
/*
 * kfault: stops, delays or replaces the call of a chosen kernel function, says when it did, and can be taken out
 * at any time.
 *
 * Everything goes through /proc/kfault. Written, one command a line; read, one event a line (256 bytes at least):
 *
 *	hold FUNCTION [nth=N] [times=M] [pid=P]		sleep at its entry until released or killed
 *	delay FUNCTION us=N [nth=N] [times=M] [pid=P]	sleep that long at its entry
 *	return FUNCTION value=V [nth=N] [times=M] [pid=P]	do not call it, let it return V
 *	release SLOT|all				wake who is held now; the slot stays armed
 *	clear SLOT|all					disarm, and wake who is held
 *	count SLOT|all					tell how many calls have been counted
 *
 *	event=reached slot=0 action=hold function=misc_cg_try_charge pid=71 tid=71 call=1 ns=5312345678 lost=0
 *
 * The open file is the owner of what was armed through it: when it is closed, by whatever means, its slots are
 * disarmed and their sleepers woken. That includes rmmod, which is why this is a file in /proc and not a device:
 * a device pins its module for as long as it is open, /proc takes an open file back (see kfault_exit).
 *
 * This file is what is told and tells; how a call is stopped is in probe.c.
 */
#include <linux/kfifo.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/proc_fs.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include "kfault.h"
#include "known.h"

static bool force;
module_param(force, bool, 0600);
MODULE_PARM_DESC(force, "take functions that are not on the list, and any value from those that are");

static const char * const action_names[] = { "hold", "delay", "return" };
static const char * const arguments[] = { " " /* never a word */, "us", "value" };
static const char * const happening_names[] = {
	"armed", "reached", "released", "killed", "delayed", "returned", "atomic", "exiting", "cleared",
	"counted",
};

static DEFINE_MUTEX(control);		/* owners, and which slots are used; never taken by a sleeper */
static LIST_HEAD(owners);
static bool leaving;			/* the module is being unloaded */
static struct proc_dir_entry *entry;

/* --- events ------------------------------------------------------------------------------------------------- */

/* When nobody reads, later events are lost and counted. Answers to a command make room for themselves. */
void kfault_tell(struct slot *slot, enum happening what, u64 call)
{
	bool answer = what == ARMED || what == CLEARED || what == COUNTED;
	struct owner *owner = slot->owner;
	struct event event = {
		.what = what, .action = slot->action, .slot = slot - owner->slots,
		.pid = current->tgid, .tid = current->pid, .call = call, .ns = ktime_get_ns(),
	};
	unsigned long flags;

	strscpy(event.function, slot->function, NAME);
	spin_lock_irqsave(&owner->lock, flags);
	if (kfifo_is_full(&owner->events)) {
		owner->lost++;
		if (answer)
			kfifo_skip(&owner->events);
	}
	event.lost = owner->lost;
	kfifo_put(&owner->events, event);
	spin_unlock_irqrestore(&owner->lock, flags);
	wake_up_interruptible(&owner->readers);
}

static bool take(struct owner *owner, struct event *event)
{
	bool taken;

	spin_lock_irq(&owner->lock);
	taken = kfifo_get(&owner->events, event);
	spin_unlock_irq(&owner->lock);
	return taken;
}

/* --- arming and disarming, under `control` ------------------------------------------------------------------ */

int kfault_refuse(int error, const char *why, const char *what)
{
	pr_info_ratelimited("kfault: %*pE: %s\n", (int)strlen(what), what, why);	/* escaped: it is anybody's */
	return error;
}

static int permitted(struct slot *slot)
{
	size_t base = strcspn(slot->function, ".");	/* without what the compiler appended */
	unsigned int need = SLEEP;
	int i;

	if (slot->action == RETURN)
		need = slot->argument < 0 && slot->argument >= -MAX_ERRNO ? FAIL | SKIP : SKIP;
	for (i = 0; i < ARRAY_SIZE(known); i++) {
		if (strncmp(known[i].name, slot->function, base) || known[i].name[base])
			continue;
		if (force || known[i].may & need)
			return 0;
		return kfault_refuse(-EPERM, "not allowed for this function without force=1", slot->function);
	}
	return force ? 0 : kfault_refuse(-EPERM, "not on the list, and force=1 is not set", slot->function);
}

static int read_options(struct slot *slot, char *options)
{
	bool given = slot->action == HOLD;
	s64 pid = S64_MIN;
	char *word;

	while ((word = strsep(&options, " "))) {
		char *name = strsep(&word, "=");
		s64 *to = NULL;

		if (!strcmp(name, "nth"))
			to = &slot->nth;
		else if (!strcmp(name, "times"))
			to = &slot->times;
		else if (!strcmp(name, "pid"))
			to = &pid;
		else if (!strcmp(name, arguments[slot->action]))
			to = &slot->argument;
		if (!to || !word || kstrtos64(word, 0, to))
			return kfault_refuse(-EINVAL, "no such option here, or not name=number", name);
		given |= to == &slot->argument;
	}
	if (!given || slot->nth < 1 || slot->times < 0)
		return kfault_refuse(-EINVAL, "delay wants us=, return wants value=, calls count from 1", slot->function);
	if (slot->action == DELAY && (slot->argument < 0 || slot->argument > U32_MAX))
		return kfault_refuse(-EINVAL, "not a time to wait", slot->function);
	if (pid != S64_MIN) {
		slot->only = pid == (int)pid ? find_get_pid(pid) : NULL;
		if (!slot->only)
			return kfault_refuse(-ESRCH, "there is no process or thread of that number", slot->function);
	}
	return 0;
}

static int arm(struct owner *owner, enum action action, const char *function, char *options)
{
	struct slot *slot = owner->slots;
	int error;

	while (slot->used)
		if (++slot == owner->slots + SLOTS)
			return kfault_refuse(-ENOSPC, "all slots are in use", function);

	memset(slot, 0, sizeof(*slot));
	slot->owner = owner;
	slot->action = action;
	slot->nth = slot->times = 1;
	init_waitqueue_head(&slot->sleepers);
	error = strscpy(slot->function, function, NAME) < 0 ? -ENOENT : 0;
	error = error ?: read_options(slot, options);
	error = error ?: permitted(slot);
	error = error ?: kfault_probe(slot, function);
	if (error) {
		put_pid(slot->only);
		return error;
	}
	slot->armer = get_pid(task_tgid(current));
	slot->used = true;
	kfault_tell(slot, ARMED, 0);	/* first, so that it is read before what happens then */
	smp_store_release(&slot->armed, true);
	return 0;
}

static void disarm(struct slot *slot)
{
	if (!slot->used)
		return;
	kfault_unprobe(slot);
	kfault_tell(slot, CLEARED, atomic64_read(&slot->calls));
	put_pid(slot->only);
	put_pid(slot->armer);
	slot->used = false;
}

static void release(struct slot *slot)
{
	if (slot->used)
		kfault_wake(slot);
}

static void count(struct slot *slot)
{
	if (slot->used)
		kfault_tell(slot, COUNTED, atomic64_read(&slot->calls));
}

static int for_slots(struct owner *owner, const char *which, void (*act)(struct slot *))
{
	unsigned int number;
	int i;

	if (!strcmp(which, "all")) {
		for (i = 0; i < SLOTS; i++)
			act(&owner->slots[i]);
		return 0;
	}
	if (kstrtouint(which, 0, &number) || number >= SLOTS || !owner->slots[number].used)
		return kfault_refuse(-EINVAL, "no such slot is armed", which);
	act(&owner->slots[number]);
	return 0;
}

static int obey(struct owner *owner, char *line)
{
	char *verb = strsep(&line, " ");
	char *what = strsep(&line, " ");
	int i;

	if (!what)
		return kfault_refuse(-EINVAL, "a command is a verb and what it is about", verb);
	for (i = 0; i < ARRAY_SIZE(action_names); i++)
		if (!strcmp(verb, action_names[i]))
			return arm(owner, i, what, line);
	if (line)
		return kfault_refuse(-EINVAL, "no such command, or too many words", verb);
	if (!strcmp(verb, "release"))
		return for_slots(owner, what, release);
	if (!strcmp(verb, "clear"))
		return for_slots(owner, what, disarm);
	if (!strcmp(verb, "count"))
		return for_slots(owner, what, count);
	return kfault_refuse(-EINVAL, "no such command", verb);
}

/* --- /proc/kfault ------------------------------------------------------------------------------------------- */

static int kfault_open(struct inode *inode, struct file *file)
{
	struct owner *owner = kvzalloc(sizeof(*owner), GFP_KERNEL);

	if (!owner)
		return -ENOMEM;
	spin_lock_init(&owner->lock);
	INIT_KFIFO(owner->events);
	init_waitqueue_head(&owner->readers);
	file->private_data = owner;
	mutex_lock(&control);
	list_add(&owner->list, &owners);
	mutex_unlock(&control);
	return 0;
}

/*
 * Called once for every open file, by its last close or by kfault_exit(). Then there may be somebody in poll() on
 * it: who waits there is woken and will find the file gone, an epoll set forgets it (POLLFREE, hence the RCU).
 */
static int kfault_release(struct inode *inode, struct file *file)
{
	struct owner *owner = file->private_data;

	mutex_lock(&control);
	for_slots(owner, "all", disarm);
	list_del(&owner->list);
	mutex_unlock(&control);
	while (wq_has_sleeper(&owner->readers)) {
		__wake_up(&owner->readers, TASK_NORMAL, 0, poll_to_key(EPOLLHUP | POLLFREE));
		schedule_timeout_uninterruptible(1);
	}
	/* The last to leave the queue may still hold its lock. */
	spin_lock_irq(&owner->readers.lock);
	spin_unlock_irq(&owner->readers.lock);
	kvfree_rcu(owner, rcu);
	return 0;
}

static ssize_t kfault_write(struct file *file, const char __user *from, size_t size, loff_t *at)
{
	char *text, *next, *line;
	size_t done = 0;
	int error = 0;

	if (size > PAGE_SIZE)
		return -E2BIG;
	next = text = memdup_user_nul(from, size);
	if (IS_ERR(text))
		return PTR_ERR(text);
	mutex_lock(&control);
	while ((line = strsep(&next, "\n"))) {
		if (*line)
			error = leaving ? -EIO : obey(file->private_data, line);
		if (error)
			break;
		done = next ? next - text : size;
	}
	mutex_unlock(&control);
	kfree(text);
	return done ?: error;	/* the error of a later line comes when that line is written again */
}

static ssize_t kfault_read(struct file *file, char __user *to, size_t size, loff_t *at)
{
	struct owner *owner = file->private_data;
	struct event event;
	char line[LINE];
	int length;

	if (size < LINE)
		return -EINVAL;
	while (!take(owner, &event)) {
		if (READ_ONCE(leaving))
			return -EIO;
		if (file->f_flags & O_NONBLOCK)
			return -EAGAIN;
		if (wait_event_interruptible(owner->readers,
					     READ_ONCE(leaving) || !kfifo_is_empty(&owner->events)))
			return -ERESTARTSYS;
	}
	length = scnprintf(line, LINE, "event=%s slot=%d action=%s function=%s pid=%d tid=%d call=%llu ns=%llu lost=%llu\n",
			   happening_names[event.what], event.slot, action_names[event.action], event.function,
			   event.pid, event.tid, event.call, event.ns, event.lost);
	return copy_to_user(to, line, length) ? -EFAULT : length;
}

static __poll_t kfault_poll(struct file *file, struct poll_table_struct *table)
{
	struct owner *owner = file->private_data;

	if (READ_ONCE(leaving))
		return EPOLLHUP;	/* and no new waiter */
	poll_wait(file, &owner->readers, table);
	return EPOLLOUT | EPOLLWRNORM | (kfifo_is_empty(&owner->events) ? 0 : EPOLLIN | EPOLLRDNORM);
}

static const struct proc_ops kfault_ops = {
	.proc_open = kfault_open,
	.proc_read = kfault_read,
	.proc_write = kfault_write,
	.proc_poll = kfault_poll,
	.proc_lseek = noop_llseek,
	.proc_release = kfault_release,
};

static int __init kfault_init(void)
{
	entry = proc_create("kfault", 0600, NULL, &kfault_ops);
	return entry ? 0 : -ENOMEM;
}
module_init(kfault_init);

/*
 * proc_remove() waits for calls that are in progress, so readers have to be sent away before it; it then calls
 * kfault_release() for every file that is still open, and from there on their owners get EIO.
 */
static void __exit kfault_exit(void)
{
	struct owner *owner;

	mutex_lock(&control);
	WRITE_ONCE(leaving, true);
	list_for_each_entry(owner, &owners, list)
		wake_up_interruptible(&owner->readers);
	mutex_unlock(&control);
	proc_remove(entry);
	synchronize_rcu_tasks();
}
module_exit(kfault_exit);

MODULE_DESCRIPTION("Holds, delays and failures at the entry of a chosen kernel function");
MODULE_LICENSE("GPL v2");

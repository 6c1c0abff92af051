// SPDX-License-Identifier: GPL-2.0-only
/*
 * planted: puts one defect or another into the SEV code of a running kernel, for tests of what should find it.
 *
 * Everything goes through /proc/planted. Written, the name of a defect plants it; there is no way back, the machine
 * is booted anew. Read, a line for each:
 *
 *	dead-destination planted=1 reached=3 activated=1
 *
 * `reached` counts how often the kernel came to the place, `activated` how often it did there what a stock one would
 * not have done. A defect that was not activated cannot have been seen by anybody. The parameter `plant` names one to
 * plant at once.
 *
 * A probe's handler may change where the call goes on: as if its caller had called another function of the same
 * arguments. No register is to be saved for that, and no stack, because the probe sits on ftrace's call at the
 * function's entry. What must sleep is done there, in the task's own context, and not in the handler.
 */
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include "planted.h"

static struct defect * const defects[] = {
	&dead_destination, &flag_left, &unkillable_wait, &foreign_refused, &lost_wakeup, &slab_overrun,
	&charged_twice, &event_elsewhere, &last_asid, &status_refused, &region_answers, &device_answers,
	&use_after_free, &lock_inversion, &leak, &race,
};

static char *plant;
module_param(plant, charp, 0444);
MODULE_PARM_DESC(plant, "the defect to plant at once");

static DEFINE_MUTEX(control);

/* --- VMs, until they are destroyed -------------------------------------------------------------------------- */

static DEFINE_RAW_SPINLOCK(vms_lock);

static void exchange(struct vms *vms, struct kvm *old, struct kvm *new)
{
	unsigned long flags;
	int i;

	raw_spin_lock_irqsave(&vms_lock, flags);
	for (i = 0; i < VMS; i++) {
		if (vms->of[i] != old)
			continue;
		vms->of[i] = new;
		if (new)
			break;
	}
	raw_spin_unlock_irqrestore(&vms_lock, flags);
	WARN_ONCE(i == VMS && new, "planted: more than %d VMs", VMS);
}

void planted_add(struct vms *vms, struct kvm *kvm)
{
	if (!planted_has(vms, kvm))
		exchange(vms, NULL, kvm);
}

bool planted_has(struct vms *vms, struct kvm *kvm)
{
	int i;

	for (i = 0; i < VMS; i++)
		if (READ_ONCE(vms->of[i]) == kvm)
			return true;
	return false;
}

static int vm_goes(struct kprobe *probe, struct pt_regs *regs)
{
	struct kvm *kvm = (struct kvm *)regs->di;

	exchange(&flagged, kvm, NULL);
	exchange(&moved_to, kvm, NULL);
	return 0;
}

static struct kprobe going = { .symbol_name = "kvm_arch_destroy_vm", .pre_handler = vm_goes };

/* --- planting, under `control` ------------------------------------------------------------------------------ */

/* kallsyms_lookup_name() is not exported, but a probe on it tells where it is. */
void *planted_symbol(const char *name)
{
	static unsigned long (*look_up)(const char *name);
	struct kprobe probe = { .symbol_name = "kallsyms_lookup_name" };

	if (!look_up && !register_kprobe(&probe)) {
		look_up = (void *)probe.addr;
		unregister_kprobe(&probe);
	}
	return look_up ? (void *)look_up(name) : NULL;
}

/* gcc may have made a variant of the function, which then has another name. */
static int set_entry(struct kprobe *probe)
{
	static const char * const suffixes[] = { "", ".constprop.0", ".isra.0" };
	const char *base = probe->symbol_name;
	kprobe_pre_handler_t handler = probe->pre_handler;
	int error = -ENOENT;
	int i;

	for (i = 0; i < ARRAY_SIZE(suffixes) && error == -ENOENT; i++) {
		char *name = kasprintf(GFP_KERNEL, "%s%s", base, suffixes[i]);	/* it is the probe's from now on */

		*probe = (struct kprobe){ .symbol_name = name, .pre_handler = handler };
		error = name ? register_kprobe(probe) : -ENOMEM;
	}
	/* Elsewhere than on ftrace's call an instruction would have to be carried out before going on. */
	if (!error && !kprobe_ftrace(probe)) {
		unregister_kprobe(probe);
		error = -EOPNOTSUPP;
	}
	return error;
}

static int put(struct defect *defect)
{
	int error = 0;
	int i;

	if (defect->planted)
		return 0;
	if (defect->begin)
		error = defect->begin();
	for (i = 0; i < ARRAY_SIZE(defect->exits) && !error && defect->exits[i]; i++) {
		defect->exits[i]->maxactive = 64;
		error = register_kretprobe(defect->exits[i]);
	}
	if (!error && defect->entry)
		error = set_entry(defect->entry);
	defect->planted = !error;
	pr_info("planted: %s: %d\n", defect->name, error);
	return error;
}

static int plant_by_name(const char *name)
{
	int error = -ENOENT;
	int i;

	mutex_lock(&control);
	for (i = 0; i < ARRAY_SIZE(defects); i++)
		if (sysfs_streq(name, defects[i]->name))
			error = put(defects[i]);
	mutex_unlock(&control);
	return error;
}

/* --- /proc/planted ------------------------------------------------------------------------------------------ */

static int show(struct seq_file *file, void *unused)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(defects); i++)
		seq_printf(file, "%s planted=%d reached=%d activated=%d\n", defects[i]->name, defects[i]->planted,
			   atomic_read(&defects[i]->reached), atomic_read(&defects[i]->activated));
	return 0;
}

static int opened(struct inode *inode, struct file *file)
{
	return single_open(file, show, NULL);
}

static ssize_t written(struct file *file, const char __user *from, size_t length, loff_t *at)
{
	char name[64] = { };
	int error;

	if (length >= sizeof(name) || copy_from_user(name, from, length))
		return -EINVAL;
	error = plant_by_name(name);
	return error ? error : length;
}

static const struct proc_ops operations = {
	.proc_open = opened, .proc_read = seq_read, .proc_write = written, .proc_lseek = seq_lseek,
	.proc_release = single_release,
};

/* What cannot be planted shows in /proc/planted: some of its probes may be set, so that the module has to stay. */
bool (*planted_is_kvm)(struct file *file);

static int __init planted_init(void)
{
	int error;

	planted_is_kvm = planted_symbol("file_is_kvm");
	if (!planted_is_kvm)
		return -ENOENT;
	error = register_kprobe(&going);
	if (error)
		return error;
	if (!proc_create("planted", 0600, NULL, &operations)) {
		unregister_kprobe(&going);
		return -ENOMEM;
	}
	if (plant)
		plant_by_name(plant);
	return 0;
}
module_init(planted_init);	/* no exit: what was planted stays */

MODULE_DESCRIPTION("Defects in the SEV code of a running kernel, for tests of what should find them");
MODULE_LICENSE("GPL v2");
